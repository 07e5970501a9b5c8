"""From checkpoint to engine: what was made from what, each link proven by a hash."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from report.artifacts import Artifacts, Finetuning, Found
from report.variants import EXPORTED, OPTIMIZED, model_bytes, targets_of
from report.words import plural, size

CHECKPOINT, STATISTICS, PLAN = "checkpoint", "statistics", "plan"
REFERENCE = "reference"
FOREIGN, MODEL = "ONNX file", "model"
"""Kinds of what is not here: a file that somebody else exported, and what is not told by what came of it."""


@dataclasses.dataclass(frozen=True)
class Node:
    """An artifact in the tree.

    Attributes:
        kind: of artifact.
        path: in the run's directory; empty where it is not there.
        sha256: what its children name.
        about: in a few words.
        damage: why its files are not what it says; empty where they are.
        children: what was made from it.
    """

    kind: str
    path: str
    sha256: str
    about: str
    damage: str = ""
    children: tuple["Node", ...] = ()


def chain(artifacts: Artifacts) -> tuple[Node, ...]:
    """The trees of a run: everything stands below what its own hash names; what is not there heads a tree."""
    there = {model.sha256 for model in artifacts.models}
    trained = artifacts.trained
    roots = [model.value.parent_sha256 for model in artifacts.models if model.value.parent_sha256 not in there]
    roots += [found.value.model_sha256 for found in artifacts.statistics]
    roots += [found.value.model_sha256 for found in artifacts.plans]
    roots += [record.model_sha256 for record in trained.values()]
    roots += [found.sha256 for found in artifacts.checkpoints]
    roots += [plan.model_sha256 for plan in artifacts.pruned.values()]
    forest = _Forest(artifacts, {found.sha256: found.path for found in artifacts.checkpoints}, trained)
    made = {*trained, *artifacts.pruned, *forest.heads}
    return tuple(forest.root(sha256) for sha256 in dict.fromkeys(roots) if sha256 not in made)


@dataclasses.dataclass(frozen=True)
class _Forest:
    artifacts: Artifacts
    checkpoints: Mapping[str, str]
    """Paths by identity."""
    trained: Mapping[str, Finetuning]

    @functools.cached_property
    def heads(self) -> Mapping[str, str]:
        """By the identity of a graph that lost experts, by which plans and statistics call it, the first manifest."""
        own = {model.sha256: model.value.model_sha256 for model in self.artifacts.models}
        pruned = [model for model in self.artifacts.models if model.value.model_sha256 != model.value.source_sha256]
        first = [model for model in pruned if own.get(model.value.parent_sha256) != model.value.model_sha256]
        return {model.value.model_sha256: model.sha256 for model in reversed(first)}

    def _kind(self, sha256: str) -> str:
        """Of a root."""
        made_from = [plan.model_sha256 for plan in self.artifacts.pruned.values()]
        made_from += [record.model_sha256 for record in self.trained.values()]
        if sha256 in self.checkpoints or sha256 in made_from:
            return CHECKPOINT
        children = [model.value for model in self.artifacts.models if model.value.parent_sha256 == sha256]
        if any(child.kind == EXPORTED for child in children):
            return CHECKPOINT
        return FOREIGN if any(child.source_sha256 == sha256 for child in children) else MODEL

    def root(self, sha256: str) -> Node:
        """A checkpoint or a foreign ONNX file, and all that came of it."""
        path, record = self.checkpoints.get(sha256, ""), self.trained.get(sha256)
        about = "" if path else "not in this directory"
        if sha256 in self.artifacts.pruned:
            about = f"pruned by {self.artifacts.pruned[sha256].criterion}"
        if record is not None:
            about = f"fine-tuned: {record.method}"
        parents = {child: plan.model_sha256 for child, plan in self.artifacts.pruned.items()}
        parents |= {child: its.model_sha256 for child, its in self.trained.items()}
        grown = [self.root(child) for child, parent in parents.items() if parent == sha256]
        children = (*self._calibrations(sha256), *self._plans(sha256), *self._models(sha256), *grown)
        return Node(self._kind(sha256), path, sha256, about, children=children)

    def _calibrations(self, sha256: str) -> Iterable[Node]:
        for found in self.artifacts.statistics:
            if found.value.model_sha256 == sha256:
                tokens = max((layer.token_count for layer in found.value.layers), default=0)
                plans = tuple(
                    _plan(plan) for plan in self.artifacts.own_plans if plan.value.statistics_sha256 == found.sha256
                )
                yield Node(STATISTICS, found.path, found.sha256, plural(tokens, "token"), children=plans)

    def _plans(self, sha256: str) -> Iterable[Node]:
        """Those that no statistics of the directory ranked."""
        ranked = {found.sha256 for found in self.artifacts.statistics}
        for found in self.artifacts.own_plans:
            if found.value.model_sha256 == sha256 and found.value.statistics_sha256 not in ranked:
                yield _plan(found)

    def _models(self, parent_sha256: str) -> Iterable[Node]:
        for model in self.artifacts.models:
            if model.value.parent_sha256 == parent_sha256:
                damage = self.artifacts.damages.get(model.path, "")
                identity = model.value.model_sha256
                is_head = self.heads.get(identity) == model.sha256
                known = (*self._calibrations(identity), *self._plans(identity)) if is_head else ()
                children = (*known, *self._models(model.sha256))
                yield Node(model.value.kind, model.path, model.sha256, self._about(model.value), damage, children)

    def _about(self, manifest: Manifest) -> str:
        said: Sequence[str] = targets_of(manifest)
        plan = next((found.path for found in self.artifacts.own_plans if found.value == manifest.plan), None)
        if plan is not None and manifest.kind in (OPTIMIZED, REFERENCE):
            said = [*said, f"with {plan}"]
        return ", ".join([*said, size(model_bytes(manifest))])


def _plan(found: Found[PruningPlan]) -> Node:
    kept = sum(len(layer.keep) for layer in found.value.layers)
    total = sum(layer.experts for layer in found.value.layers)
    return Node(PLAN, found.path, found.sha256, f"{found.value.criterion}, keeps {kept} of {total} experts")
