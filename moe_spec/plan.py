"""plan.json: which experts of which layer stay, and what becomes of the router and of the others."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError
from moe_spec.files import inside, new_file
from moe_spec.layer_plan import ALIAS, FULL, REMAKE, REPLACE, LayerPlan
from moe_spec.means import Means, dump_means, load_means, means_path
from moe_spec.record import Json, Record, load_record, save_record

PLAN = "plan.json"
"""The plan that a pruned checkpoint was made by, kept in its directory."""

SCHEMA = 2

BY_HAND = "by hand"
"""`PruningPlan.criterion` of experts that were named."""
EXPERTS, BYTES, MILLISECONDS = "experts", "bytes", "ms"
"""Units of ``budget`` among `PruningPlan.options`."""


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """Which experts stay, and where that decision came from.

    Attributes:
        model_sha256: identity of the model that was planned for (``Manifest.model_sha256``).
        criterion: name of the criterion that ranked.
        options: budget and criterion options, as given.
        statistics_sha256: the statistics that were ranked, or None where the criterion needs none.
        layers: in model order; a layer that is not named stays as it is.
        means_sha256: of the file with the mean outputs that take the place of experts, or None where none do.
    """

    model_sha256: str
    criterion: str
    layers: tuple[LayerPlan, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics_sha256: str | None = None
    means_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.means_sha256 is None and self.means:
            object.__setattr__(self, "means_sha256", hashlib.sha256(dump_means(self.means)).hexdigest())

    @property
    def means(self) -> dict[str, Means]:
        """Mean outputs by the name of the layer, where they are at hand."""
        return {layer.name: layer.means_DH for layer in self.layers if layer.means_DH is not None}

    @property
    def merges(self) -> bool:
        """Whether experts of some layer are merged."""
        return any(layer.merge for layer in self.layers)

    def layer(self, name: str) -> LayerPlan | None:
        """The plan for layer ``name``, if it has one."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def require_model(self, model_sha256: str, where: str) -> None:
        """Refuse a plan that was made for another model.

        Raises:
            UserError: the hashes differ.
        """
        if model_sha256 != self.model_sha256:
            raise UserError(
                f"the plan was made for model {self.model_sha256[:12]}, but {where} is model {model_sha256[:12]}",
                hint="make a plan for this model with `moe-edge plan`; if it is the same model exported by another "
                "tool: optimize --any-model",
            )

    @property
    def shares_experts(self) -> bool:
        """Whether rows of some router share an expert."""
        return any(layer.router == ALIAS for layer in self.layers)

    def require_no_aliases(self) -> None:
        """Refuse a plan by which rows of a router share an expert, for what has an expert a row.

        Raises:
            UserError: with a layer of which it says so.
        """
        aliased = [layer.name for layer in self.layers if layer.router == ALIAS]
        if aliased:
            raise UserError(
                f"the plan lets rows of the router of layer {aliased[0]} share an expert, but a checkpoint has one for "
                "each row",
                hint="moe-edge export CHECKPOINT -o exported/ && "
                "moe-edge optimize exported/ --plan plan.json -o optimized/",
            )

    @property
    def by(self) -> str:
        """What chose the experts, in words.

        >>> PruningPlan("", "reap", ()).by, PruningPlan("", BY_HAND, ()).by
        ('by reap', 'by hand')
        """
        return self.criterion if self.criterion == BY_HAND else f"by {self.criterion}"

    def require_narrow_routers(self, where: str) -> None:
        """Refuse a plan that leaves rows of a router without an expert, for what cannot have such.

        Raises:
            UserError: a layer drops experts and keeps its router full.
        """
        full = [layer.name for layer in self.layers if layer.router in (FULL, REPLACE) and layer.dropped]
        if full:
            raise UserError(
                f"the plan keeps the router of layer {full[0]} full, but {where} has as many experts as its router "
                "has rows",
                hint="export it, an ONNX graph may have fewer: moe-edge export CHECKPOINT --plan plan.json "
                "-o exported/",
            )

    def to_json(self) -> Json:
        """The plan as it stands in plan.json and, embedded, in manifests."""
        return {
            "model_sha256": self.model_sha256,
            "criterion": self.criterion,
            "options": dict(self.options),
            "statistics_sha256": self.statistics_sha256,
            "means_sha256": self.means_sha256,
            "layers": [layer.to_json() for layer in self.layers],
        }

    @classmethod
    def from_record(cls, record: Record, *, clamp_top_k: bool = False) -> "PruningPlan":
        """Read a plan from plan.json or from a manifest that embeds one."""
        layers = tuple(LayerPlan.from_record(layer, clamp_top_k=clamp_top_k) for layer in record.records("layers"))
        names = [layer.name for layer in layers]
        for name in names:
            if names.count(name) > 1:
                raise record.fail(f"layer {name!r} is planned twice")
        return cls(
            model_sha256=record.take("model_sha256", str),
            criterion=record.take("criterion", str),
            options=record.take("options", dict),
            statistics_sha256=record.take("statistics_sha256", str, default=None),
            layers=layers,
            means_sha256=record.take("means_sha256", str, default=None),
        )

    def save(self, path: Path) -> None:
        """Write plan.json, and beside it the mean outputs that take the place of experts."""
        if not self.means:
            save_record(path, "plan", SCHEMA, self.to_json())
            return
        beside, data = means_path(path), dump_means(self.means)
        named = {"means": beside.name, "means_sha256": hashlib.sha256(data).hexdigest()}
        try:
            with new_file(beside) as staging:
                staging.write_bytes(data)
            save_record(path, "plan", SCHEMA, self.to_json() | named)
        except BaseException:  # ctrl-C too: no file without the plan that names it
            beside.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path, *, clamp_top_k: bool = False) -> "PruningPlan":
        """Read plan.json. With ``clamp_top_k``, K shrinks to what a layer keeps instead of being refused.

        Raises:
            UserError: the file is missing, cut, another artifact, of another schema, or plans what cannot be; or the
                file with the mean outputs is not the one that it names.
        """
        record = load_record(path, "plan", SCHEMA, REMAKE)
        plan = cls.from_record(record, clamp_top_k=clamp_top_k)
        replaced = {
            layer.name: len(layer.dropped) for layer in plan.layers if layer.router == REPLACE and layer.dropped
        }
        if not replaced:
            return plan
        file = inside(path.parent, record.take("means", str), path)
        means = load_means(file, record.take("means_sha256", str), replaced, REMAKE)
        layers = (dataclasses.replace(layer, means_DH=means.get(layer.name)) for layer in plan.layers)
        return dataclasses.replace(plan, layers=tuple(layers))
