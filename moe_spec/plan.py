"""plan.json: which experts of which layer stay, and what becomes of the router and of the others."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups, check_keep
from moe_spec.files import inside, new_file
from moe_spec.means import Means, dump_means, load_means, means_path
from moe_spec.record import Json, Record, load_record, save_record

PLAN = "plan.json"
"""The plan that a pruned checkpoint was made by, kept in its directory."""

SCHEMA = 2
_REMAKE = "make it again with `moe-edge plan`"

ROWS, FULL, REPLACE, MEAN, NEW, ALIAS = "rows", "full", "replace", "mean", "new", "alias"
ROUTERS: Mapping[str, str] = {
    ROWS: "the rows of dropped experts go: a token that chose one gets its next best survivor",
    FULL: "the router stays as it is: a token that chose a dropped expert gets nothing from it",
    REPLACE: "the router stays as it is: a token that chose a dropped expert gets that one's mean output, gated",
    MEAN: "the row of a survivor is the weighted mean of those merged into it",
    NEW: "all rows are drawn anew, and have to be trained",
    ALIAS: "the router stays as it is: all rows of a group lead to the one expert that it became, and gates add up",
}
"""What becomes of a layer's router."""

DROP_ROUTERS = (ROWS, FULL, REPLACE)
MERGE_ROUTERS = (ROWS, MEAN, NEW, ALIAS)

UNTOUCHED = (FULL, REPLACE, ALIAS)
"""Routers that choose as ever, so that K stays and any number of experts may."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """The parent's experts that become one survivor: their weighted mean.

    Attributes:
        experts: ids of the parent's experts, ascending.
        weights: of each, not negative; they are divided by their sum.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> tuple[tuple[float, int], ...]:
        """Weight and id of each expert that counts: those with the weight 0 are not even looked at."""
        pairs = zip(self.weights, self.experts, strict=True)
        return tuple((weight, expert) for weight, expert in pairs if weight)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one MoE layer.

    Attributes:
        name: path of the MoE block in the model, e.g. ``model.layers.3.mlp``.
        experts: E of the parent model.
        top_k: K once pruned, at most ``len(keep)``.
        keep: ids of the parent's experts that stay, ascending.
        scores: (E,) what the criterion gave; higher is kept.
        groups: the parent's group-limited routing, if it has one.
        router: one of ``ROUTERS``. With those in ``UNTOUCHED``, K is that of the parent, and fewer than K may stay.
        merge: for each of ``keep`` what it becomes the mean of, itself included; empty where experts are dropped.
        align: permute the neurons of merged experts to those of the survivor before they are averaged.
        means_DH: with ``replace``, what each of ``dropped`` gives on average, float32. It is no part of plan.json, and
            None where only that was read.
    """

    name: str
    experts: int
    top_k: int
    keep: tuple[int, ...]
    scores: tuple[float, ...] = ()
    groups: Groups | None = None
    router: str = ROWS
    merge: tuple[Merge, ...] = ()
    align: bool = False
    means_DH: Means | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.router not in (MERGE_ROUTERS if self.merge else DROP_ROUTERS):
            kind = "merges" if self.merge else "drops"
            raise UserError(f"layer {self.name} {kind} experts with the router {self.router!r}", hint=_REMAKE)
        if self.router in UNTOUCHED:
            check_keep(self.name, self.experts, 1, self.keep)
        else:
            check_keep(self.name, self.experts, self.top_k, self.keep, self.groups)
        self._check_merge()
        self._check_means()
        if self.scores and len(self.scores) != self.experts:
            raise UserError(f"layer {self.name} has {len(self.scores)} scores for {self.experts} experts", hint=_REMAKE)

    def _check_merge(self) -> None:
        """Every survivor is merged from itself and others, no expert twice, with weights that have a sum."""
        if not self.merge:
            return
        ids = [expert for merge in self.merge for expert in merge.experts]
        fits = len(self.merge) == len(self.keep) and len(set(ids)) == len(ids) and set(ids) <= set(range(self.experts))
        fits = fits and (self.router != ALIAS or len(ids) == self.experts)
        fits = fits and all(
            own in merge.experts
            and len(merge.weights) == len(merge.experts)
            and min(merge.weights) >= 0
            and 0 < sum(merge.weights) < math.inf
            for own, merge in zip(self.keep, self.merge, strict=True)
        )
        if not fits:
            raise UserError(
                f"layer {self.name} keeps {list(self.keep)} but merges {[list(merge.experts) for merge in self.merge]}",
                hint="each survivor with itself and others, no expert twice, with the router "
                f"{ALIAS!r} every expert, weights above 0; {_REMAKE}",
            )
        if self.groups is not None and self.router != ALIAS:
            self._check_merge_groups(self.groups)

    def _check_merge_groups(self, groups: Groups) -> None:
        """A router with groups finds an expert by its group, so only experts of one group can become one."""
        for merge in self.merge:
            if max(groups.survivors(merge.experts, self.experts)) < len(merge.experts):
                raise UserError(
                    f"layer {self.name} merges experts {list(merge.experts)}, which are of different routing groups",
                    hint=f"merge inside each of the {groups.count} groups; {_REMAKE}",
                )

    def _check_means(self) -> None:
        """There is a finite row for every expert that is replaced."""
        if self.means_DH is None:
            return
        shape, rows = list(self.means_DH.shape), len(self.dropped)
        if self.router != REPLACE or len(shape) != 2 or shape[0] != rows or not np.isfinite(self.means_DH).all():
            raise UserError(
                f"layer {self.name} has mean outputs {shape} for the router {self.router!r}, "
                f"expected [{rows}, H] finite numbers for {REPLACE!r}",
                hint=_REMAKE,
            )

    def mean_outputs(self, hidden: int) -> Means:
        """(D, H) float32, what takes the place of each of ``dropped``, in a model of width ``hidden``.

        Raises:
            UserError: they were not read along, or are of another width.
        """
        if self.means_DH is None:
            raise UserError(
                f"the plan puts mean outputs in the place of experts of layer {self.name}, which are not at hand",
                hint="give the plan.json that names them: --plan plan.json",
            )
        if self.means_DH.shape[1] != hidden:
            raise UserError(
                f"the plan has mean outputs of {self.means_DH.shape[1]} channels for layer {self.name}, whose experts "
                f"give {hidden}",
                hint="make a plan for this model with `moe-edge plan`",
            )
        return self.means_DH

    @property
    def survivor_of(self) -> tuple[int, ...]:
        """For each of the parent's experts the one that it is merged into; itself where it is not merged."""
        survivors = {expert: own for own, merge in zip(self.keep, self.merge, strict=False) for expert in merge.experts}
        return tuple(survivors.get(expert, expert) for expert in range(self.experts))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Ids of the parent's experts that go, ascending."""
        return tuple(sorted(set(range(self.experts)) - set(self.keep)))

    def to_json(self) -> Json:
        """The layer as it stands in plan.json and in manifests."""
        values = dataclasses.asdict(dataclasses.replace(self, means_DH=None))
        del values["means_DH"]
        return values | {"keep": list(self.keep), "scores": list(self.scores)}

    @classmethod
    def from_record(cls, record: Record, *, clamp_top_k: bool = False) -> "LayerPlan":
        """Read one layer; feasibility is checked again, because plans are edited by hand."""
        keep = record.items("keep", int)
        top_k = record.take("top_k", int)
        clamp_top_k = clamp_top_k and record.take("router", str, default=ROWS) not in UNTOUCHED
        return cls(
            name=record.take("name", str),
            experts=record.take("experts", int),
            top_k=min(top_k, max(1, len(keep))) if clamp_top_k else top_k,
            keep=keep,
            scores=record.items("scores", float),
            groups=Groups.from_record(record.record("groups")),
            router=record.take("router", str, default=ROWS),
            merge=tuple(
                Merge(merge.items("experts", int), merge.items("weights", float)) for merge in record.records("merge")
            ),
            align=record.take("align", bool, default=False),
        )


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
        record = load_record(path, "plan", SCHEMA, _REMAKE)
        plan = cls.from_record(record, clamp_top_k=clamp_top_k)
        replaced = {
            layer.name: len(layer.dropped) for layer in plan.layers if layer.router == REPLACE and layer.dropped
        }
        if not replaced:
            return plan
        file = inside(path.parent, record.take("means", str), path)
        means = load_means(file, record.take("means_sha256", str), replaced, _REMAKE)
        layers = (dataclasses.replace(layer, means_DH=means.get(layer.name)) for layer in plan.layers)
        return dataclasses.replace(plan, layers=tuple(layers))
