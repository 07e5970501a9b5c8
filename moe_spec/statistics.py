"""statistics.safetensors: what the router did on calibration data, as sums that add up across shards."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.files import new_file, require_file
from moe_spec.record import Record, dump_record, parse_record

SCHEMA = 1
_REMAKE = "make it again with `moe-edge calibrate`"
_HEADER = "moe_edge"
"""The only metadata key: safetensors writes several in random order, and equal statistics shall be equal bytes."""

SUMS: Mapping[str, str] = {
    "tokens": "n_e, how many tokens selected the expert",
    "gate": "G_e, sum of the weight g_e(x) that really multiplied the output, over the tokens that selected the expert",
    "output_norm": "A1_e, sum of the output norm ||f_e(x)||_2 over those tokens",
    "output_norm_squared": "A2_e, sum of ||f_e(x)||_2^2 over those tokens",
    "gated_norm": "GA_e, sum of g_e(x) ||f_e(x)||_2 over those tokens",
}
"""The additive sums of one layer, each (E,) float64. A shorter name than the papers' symbols, which follow it."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Sums of one MoE layer.

    Attributes:
        name: path of the MoE block, as in ``LayerPlan``.
        experts: E.
        top_k: K of the model.
        token_count: valid (not padding) tokens that went through the layer.
        sums: (E,) float64 for every key of ``SUMS``.
        groups: group-limited routing, if the layer has one.
    """

    name: str
    experts: int
    top_k: int
    token_count: int
    sums: Mapping[str, npt.NDArray[np.float64]]
    groups: Groups | None = None

    def __getitem__(self, key: str) -> npt.NDArray[np.float64]:
        return self.sums[key]

    def add(self, other: "LayerStatistics") -> "LayerStatistics":
        """The statistics of both shards together."""
        return dataclasses.replace(
            self,
            token_count=self.token_count + other.token_count,
            sums={key: self.sums[key] + other.sums[key] for key in SUMS},
        )


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration saw.

    Attributes:
        model_sha256: identity of the model (``Manifest.source_sha256``).
        data_sha256: one hash for each shard of data, in the order in which they were merged.
        layers: in model order.
    """

    model_sha256: str
    data_sha256: tuple[str, ...]
    layers: tuple[LayerStatistics, ...]

    def save(self, path: Path) -> None:
        """Write statistics.safetensors."""
        header = {
            "model_sha256": self.model_sha256,
            "data_sha256": list(self.data_sha256),
            "layers": [
                {
                    "name": layer.name,
                    "experts": layer.experts,
                    "top_k": layer.top_k,
                    "token_count": layer.token_count,
                    "groups": None if layer.groups is None else dataclasses.asdict(layer.groups),
                }
                for layer in self.layers
            ],
        }
        tensors = {
            f"{layer.name}/{key}": np.ascontiguousarray(layer.sums[key]) for layer in self.layers for key in SUMS
        }
        with new_file(path) as staging:
            safetensors.numpy.save_file(tensors, staging, {_HEADER: dump_record("statistics", SCHEMA, header)})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read statistics.safetensors.

        Raises:
            UserError: the file is missing, cut, no statistics, of another schema, or lacks a tensor.
        """
        require_file(path, "statistics (safetensors)")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {}).get(_HEADER)
                if text is None:  # any safetensors file; its tensors may be many gigabytes
                    raise UserError(f"{path} holds no statistics", hint=_REMAKE)
                header = parse_record(path, text, "statistics", SCHEMA, _REMAKE)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is no complete safetensors file: {error}", hint=_REMAKE) from error
        return cls(
            model_sha256=header.take("model_sha256", str),
            data_sha256=header.items("data_sha256", str),
            layers=tuple(_layer(record, tensors) for record in header.records("layers")),
        )


def _layer(record: Record, tensors: Mapping[str, npt.NDArray[np.float64]]) -> LayerStatistics:
    name, experts = record.take("name", str), record.take("experts", int)
    sums = {}
    for key in SUMS:
        tensor = tensors.get(f"{name}/{key}")
        if tensor is None or tensor.shape != (experts,) or tensor.dtype != np.float64:
            found = "nothing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
            raise record.fail(f"tensor {name}/{key} holds {found}, expected float64[{experts}]")
        sums[key] = tensor
    groups = record.record("groups")
    return LayerStatistics(
        name=name,
        experts=experts,
        top_k=record.take("top_k", int),
        token_count=record.take("token_count", int),
        sums=sums,
        groups=None if groups is None else Groups(groups.take("count", int), groups.take("selected", int)),
    )


def merge(left: Statistics, right: Statistics) -> Statistics:
    """The statistics of two shards of data together: what one pass over both would have given.

    Raises:
        UserError: the shards were taken from different models, or from different layers of one.
    """
    if left.model_sha256 != right.model_sha256:
        raise UserError(
            f"statistics of model {left.model_sha256[:12]} cannot be merged with those of {right.model_sha256[:12]}",
            hint="calibrate every shard with the same checkpoint",
        )
    mine, theirs = (
        [(layer.name, layer.experts, layer.top_k, layer.groups) for layer in shard.layers] for shard in (left, right)
    )
    if mine != theirs:
        raise UserError("the shards have different MoE layers", hint="calibrate every shard with the same checkpoint")
    return dataclasses.replace(
        left,
        data_sha256=left.data_sha256 + right.data_sha256,
        layers=tuple(one.add(other) for one, other in zip(left.layers, right.layers, strict=True)),
    )
