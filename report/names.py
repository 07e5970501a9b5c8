"""What artifacts are called in a command, and what has to be brought along to run it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_spec.plan import PruningPlan
from report.artifacts import Artifacts, Found, folder_of
from report.variants import EXPORTED
from report.words import short

DATA, CHECKPOINT, MODEL = "DATA", "CHECKPOINT", "MODEL"
_LETTERS = 8
"""Of a hash, where there are several of a kind."""


class Names:
    """By hash: a path within the run, or the name of what lies outside of it.

    Attributes:
        plans: those that `plan` wrote, not `prune` or `finetune`.
        data: names of data by hash.
        checkpoints: names of checkpoints that are not in the run, by identity.
        models: names of graphs that are not in the run, by the hash of their manifest or file.
    """

    def __init__(self, artifacts: Artifacts) -> None:
        finds: tuple[Found[Any], ...] = (*artifacts.models, *artifacts.checkpoints, *artifacts.statistics)
        pruned = [model for model in artifacts.models if model.value.model_sha256 != model.value.source_sha256]
        self._paths = {model.value.model_sha256: model.path for model in reversed(pruned)}
        self._paths |= {found.sha256: found.path for found in finds}
        trained = {folder_of(found.path) for found in artifacts.finetunings}
        self.plans = [found for found in artifacts.own_plans if folder_of(found.path) not in trained]
        self.data = _named(_new(_data(artifacts), {}), DATA, ".npz")
        self.models = _named(_new(_graphs(artifacts), self._paths), MODEL)
        self.checkpoints = _named(_new(_sources(artifacts), {**self._paths, **self.models}), CHECKPOINT)

    @property
    def outside(self) -> Mapping[str, str]:
        """Hashes of what the commands read and the run does not hold, by name."""
        return {name: sha256 for named in (self.checkpoints, self.models, self.data) for sha256, name in named.items()}

    def path(self, sha256: str | None, otherwise: str = MODEL) -> str:
        """Of a model, checkpoint or statistics."""
        known = (named.get(sha256 or "") for named in (self._paths, self.checkpoints, self.models))
        return next(filter(None, known), otherwise)

    def plan(self, plan: PruningPlan) -> str:
        """Where a plan lies that says the same."""
        return next((found.path for found in self.plans if found.value == plan), "plan.json")


def _new(hashes: Iterable[str], known: Mapping[str, str]) -> dict[str, None]:
    """Each once, without those that have a name."""
    return dict.fromkeys(sha256 for sha256 in hashes if sha256 not in known)


def _named(hashes: Mapping[str, None], name: str, suffix: str = "") -> dict[str, str]:
    """A name for each, which is short where there is but one."""
    return {sha256: (f"{name}-{sha256[:_LETTERS]}" if len(hashes) > 1 else name) + suffix for sha256 in hashes}


def _data(artifacts: Artifacts) -> Iterator[str]:
    for statistics in artifacts.statistics:
        yield from statistics.value.data_sha256
    for plan in artifacts.plans:
        yield from filter(None, [plan.value.options.get("data_sha256")])
    yield from (record.value.data_sha256 for record in artifacts.finetunings)
    for model in artifacts.models:
        activations = model.value.details.get("activations")
        yield from filter(None, [isinstance(activations, dict) and activations.get("data_sha256")])
    yield from filter(None, (parity.value.data_sha256 for parity in artifacts.parities))


def _sources(artifacts: Artifacts) -> Iterator[str]:
    """Identities of what was looked at, planned for, exported and trained."""
    yield from (found.value.model_sha256 for found in artifacts.statistics)
    yield from (found.value.model_sha256 for found in artifacts.plans)
    yield from (model.value.parent_sha256 for model in artifacts.models if model.value.kind == EXPORTED)
    for record in (found.value for found in artifacts.finetunings):
        yield from filter(None, (record.model_sha256, record.teacher_sha256))


def _graphs(artifacts: Artifacts) -> Iterator[str]:
    """Hashes of what models were made from, and of what they were compared with."""
    yield from (model.value.parent_sha256 for model in artifacts.models if model.value.kind != EXPORTED)
    for report in (found.value for found in artifacts.parities):
        yield from (report.candidate_sha256, report.reference_sha256)


def called(artifacts: Artifacts, sha256: str) -> str:
    """What a page calls a model or checkpoint: its path, or the beginning of its hash where it is not in the run."""
    finds: tuple[Found[Any], ...] = (*artifacts.checkpoints, *artifacts.models)
    return next((found.path for found in finds if found.sha256 == sha256), short(sha256))
