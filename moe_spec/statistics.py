"""statistics.safetensors: what routers and experts did on calibration data, as sums that add up across shards."""

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

SCHEMA = 2
_REMAKE = "make it again with `moe-edge calibrate`"
_HEADER = "moe_edge"
"""The only metadata key: safetensors writes several in random order, and equal statistics shall be equal bytes."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One statistic of a layer.

    Attributes:
        axes: one letter an axis: E experts, H hidden width.
        what: in the papers' symbols. X_e are the tokens x that selected expert e; g_e(x) is the weight that really
            multiplied its output f_e(x); z(x) are the router's logits.
        dense: whether every expert has to run on every token for it.
        largest: whether shards are merged by the larger value; else they add up.
    """

    axes: str
    what: str
    dense: bool = False
    largest: bool = False


KEYS: Mapping[str, Key] = {
    "tokens": Key("E", "n_e, how many tokens selected the expert"),
    "probability": Key("E", "P_e, sum over all tokens of the router's score of the expert, before any is selected"),
    "gate": Key("E", "G_e, sum of g_e(x) over X_e"),
    "gate_squared": Key("E", "sum of g_e(x)^2 over X_e"),
    "output_norm": Key("E", "A1_e, sum of ||f_e(x)||_2 over X_e"),
    "output_norm_squared": Key("E", "A2_e, sum of ||f_e(x)||_2^2 over X_e"),
    "gated_norm": Key("E", "GA_e, sum of g_e(x) ||f_e(x)||_2 over X_e"),
    "gated_norm_squared": Key("E", "sum of (g_e(x) ||f_e(x)||_2)^2 over X_e"),
    "gated_norm_change": Key("E", "GAS_e, sum of g_e(x) ||f_e(x)||_2 s(x) over X_e, s = max(0, 1 - cos(h, h + y)), "
                                  "h what the experts read and y the sum that they give"),
    "output_peak": Key("E", "largest |element| of f_e(x) over X_e", largest=True),
    "output": Key("EH", "sum of f_e(x) over X_e"),
    "output_squared": Key("EH", "sum of f_e(x)^2, element by element, over X_e"),
    "logit_gram": Key("EE", "sum of z_i(x) z_j(x) over all tokens"),
    "output_of_all": Key("EH", "sum of f_e(x) over all tokens", dense=True),
    "output_cosine": Key("EE", "sum of cos(f_i(x), f_j(x)) over all tokens", dense=True),
}  # fmt: skip
"""Every statistic, each float64. A file may lack some: dense ones cost a run of every expert, and what an ONNX graph
does not show cannot be seen in it."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one MoE layer.

    Attributes:
        name: path of the MoE block, as in ``LayerPlan``.
        experts: E.
        top_k: K of the model.
        token_count: valid (not padding) tokens that went through the layer.
        sums: float64 arrays by key of ``KEYS``, all of them or some.
        groups: group-limited routing, if the layer has one.
    """

    name: str
    experts: int
    top_k: int
    token_count: int
    sums: Mapping[str, npt.NDArray[np.float64]]
    groups: Groups | None = None

    def __getitem__(self, key: str) -> npt.NDArray[np.float64]:
        """The statistic ``key``.

        Raises:
            UserError: the statistics were taken without it.
        """
        if key not in self.sums:
            how = "moe-edge calibrate --dense" if KEYS[key].dense else "moe-edge calibrate on the checkpoint"
            raise UserError(f"the statistics of layer {self.name} lack {key!r}: {KEYS[key].what}", hint=how)
        return self.sums[key]

    def add(self, other: "LayerStatistics") -> "LayerStatistics":
        """The statistics of both shards together; both have the same keys."""
        merged = {
            key: np.maximum(mine, other.sums[key]) if KEYS[key].largest else mine + other.sums[key]
            for key, mine in self.sums.items()
        }
        return dataclasses.replace(self, token_count=self.token_count + other.token_count, sums=merged)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration saw.

    Attributes:
        model_sha256: identity of the model (``Manifest.model_sha256``).
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
                    "keys": sorted(layer.sums),
                }
                for layer in self.layers
            ],
        }
        tensors = {
            f"{layer.name}/{key}": np.ascontiguousarray(values)
            for layer in self.layers
            for key, values in layer.sums.items()
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


def holds_statistics(path: Path) -> bool:
    """Whether a safetensors file says of itself that it holds statistics; weights and damaged files do not."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return _HEADER in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def _layer(record: Record, tensors: Mapping[str, npt.NDArray[np.float64]]) -> LayerStatistics:
    name, experts = record.take("name", str), record.take("experts", int)
    return LayerStatistics(
        name=name,
        experts=experts,
        top_k=record.take("top_k", int),
        token_count=record.take("token_count", int),
        sums={key: _values(record, key, tensors.get(f"{name}/{key}"), experts) for key in record.items("keys", str)},
        groups=Groups.from_record(record.record("groups")),
    )


def _values(record: Record, key: str, tensor: npt.NDArray[np.float64] | None, experts: int) -> npt.NDArray[np.float64]:
    if key not in KEYS:
        raise record.fail(f"{key!r} is no statistic")
    axes, name = KEYS[key].axes, f"{record.take('name', str)}/{key}"
    if tensor is None or tensor.dtype != np.float64 or not _has_axes(tensor.shape, axes, experts):
        found = "nothing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
        expected = ", ".join(str(experts) if axis == "E" else axis for axis in axes)
        raise record.fail(f"tensor {name} holds {found}, expected float64[{expected}]")
    return tensor


def _has_axes(shape: tuple[int, ...], axes: str, experts: int) -> bool:
    """Whether there are as many axes, and those of experts have their number."""
    return len(shape) == len(axes) and all(
        length == experts for length, axis in zip(shape, axes, strict=True) if axis == "E"
    )


def merge(left: Statistics, right: Statistics) -> Statistics:
    """The statistics of two shards of data together: what one pass over both would have given.

    Raises:
        UserError: the shards were taken from different models, from different layers of one, or from the same data.
    """
    if left.model_sha256 != right.model_sha256:
        raise UserError(
            f"statistics of model {left.model_sha256[:12]} cannot be merged with those of {right.model_sha256[:12]}",
            hint="calibrate every shard with the same checkpoint",
        )
    twice = [shard for shard in right.data_sha256 if shard in left.data_sha256]
    if twice:
        raise UserError(
            f"two of the statistics were taken on the same data {twice[0][:12]}, which would count twice",
            hint="merge each shard once; to share one file among machines, split it before it is calibrated",
        )
    mine, theirs = (
        [(layer.name, layer.experts, layer.top_k, layer.groups, sorted(layer.sums)) for layer in shard.layers]
        for shard in (left, right)
    )
    if mine != theirs:
        raise UserError(
            "the shards have different MoE layers, or different statistics of them",
            hint="calibrate every shard with the same checkpoint and the same options",
        )
    return dataclasses.replace(
        left,
        data_sha256=left.data_sha256 + right.data_sha256,
        layers=tuple(one.add(other) for one, other in zip(left.layers, right.layers, strict=True)),
    )
