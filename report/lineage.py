"""Who was made from whom, as far as hashes say: where things lie says nothing of it."""

from collections.abc import Iterator, Mapping

from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from report.artifacts import Artifacts


class Lineage:
    """Of the models and checkpoints of a run.

    Models are called by the hash of their manifest, checkpoints and foreign ONNX files by their identity.
    """

    def __init__(self, artifacts: Artifacts) -> None:
        self._models = {model.sha256: model.value for model in artifacts.models}
        self._sources = {child: plan.model_sha256 for child, plan in artifacts.pruned.items()}
        self._sources |= {child: record.model_sha256 for child, record in artifacts.trained.items()}
        self._pruned = {sha256 for sha256, plan in artifacts.plans_within.items() if drops(plan.value)}

    def ancestors(self, sha256: str) -> Mapping[str, None]:
        """What a model or checkpoint was made from; the start of a chain is known even where its links are not here."""
        found: dict[str, None] = {}
        waiting = [sha256]
        for one in waiting:  # which grows
            new = dict.fromkeys(self._parents(one))
            waiting += [parent for parent in new if parent not in found]
            found |= new
        return {one: None for one in found if one != sha256}  # whoever forges hashes makes rings

    def _parents(self, sha256: str) -> tuple[str, ...]:
        model = self._models.get(sha256)
        if model is not None:
            return model.parent_sha256, model.source_sha256
        return (self._sources[sha256],) if sha256 in self._sources else ()

    def line(self, sha256: str) -> Iterator[Manifest]:
        """A model, and those that it was made from, as far as they are here."""
        return (self._models[one] for one in (sha256, *self.ancestors(sha256)) if one in self._models)

    def is_whole(self, sha256: str) -> bool:
        """Whether no plan took experts from a model, nor from the checkpoint that it was made from."""
        lost = any(manifest.plan is not None and drops(manifest.plan) for manifest in self.line(sha256))
        return not lost and self._pruned.isdisjoint(self.ancestors(sha256))

    def origin(self, sha256: str) -> str:
        """The checkpoint or foreign ONNX file that a model was made from, the nearest that has all experts."""
        source = self._models[sha256].source_sha256
        before = [source, *self.ancestors(source)]
        pruned = [index for index, one in enumerate(before) if one in self._pruned]
        return before[min(pruned[-1] + 1, len(before) - 1)] if pruned else source

    def is_reference(self, reference: str, candidate: str) -> bool:
        """Whether ``candidate`` was made from ``reference``, or both from the same; nothing is proven by itself."""
        mine, theirs = self.ancestors(candidate), self.ancestors(reference)
        is_relative = reference != candidate and candidate not in theirs and not theirs.keys().isdisjoint(mine)
        return reference in mine or is_relative


def drops(plan: PruningPlan) -> bool:
    """Whether experts go by ``plan``."""
    return any(len(layer.keep) < layer.experts for layer in plan.layers)
