"""What lies in a run's directory: every artifact below it, and what could not be read."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.identity import checkpoint_sha256, is_checkpoint
from moe_spec.manifest import FILE_NAME, Manifest
from moe_spec.plan import PLAN, PruningPlan
from moe_spec.progress import Progress, counted, silent
from moe_spec.record import load_record
from moe_spec.statistics import Statistics, holds_statistics
from runtime.bench_report import BenchReport
from runtime.bundle.bundle import KIND as BUNDLE
from runtime.verification.report import ParityReport

T = TypeVar("T")

_LARGEST_JSON = 64 << 20
"""Bytes; a plan for 60 layers of 384 experts has one million. Tokenizers are large, and none of ours."""


@dataclasses.dataclass(frozen=True)
class Found(Generic[T]):
    """An artifact and where it is.

    Attributes:
        path: below the run's directory, with slashes; of a model, its directory.
        sha256: of the file; of a model, of its manifest.json; of a checkpoint, its identity.
        value: what it holds.
    """

    path: str
    sha256: str
    value: T


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """What finetuning.json says of a checkpoint.

    Attributes:
        method: name of the method.
        model_sha256: identity of the checkpoint that was trained.
        data_sha256: of what it was trained on.
        teacher_sha256: identity of the checkpoint that was imitated, if one was.
        options: of the method.
        recipe: optimizer and schedule.
    """

    method: str
    model_sha256: str
    data_sha256: str
    teacher_sha256: str | None
    options: Mapping[str, Any]
    recipe: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Artifacts:
    """All of a run, each kind sorted by path.

    Attributes:
        name: of the directory.
        models: exported, optimized, reference, engine and bundle directories, each manifest once.
        plans: plan.json files.
        statistics: of calibrations.
        parities: what `verify` wrote.
        benches: what `bench` wrote.
        finetunings: finetuning.json files.
        checkpoints: directories in transformers' layout; the value is their config.json's path.
        damages: why files are not what a model's manifest says, by the model's path.
        problems: artifacts that could not be read, and why.
    """

    name: str
    models: tuple[Found[Manifest], ...] = ()
    plans: tuple[Found[PruningPlan], ...] = ()
    statistics: tuple[Found[Statistics], ...] = ()
    parities: tuple[Found[ParityReport], ...] = ()
    benches: tuple[Found[BenchReport], ...] = ()
    finetunings: tuple[Found[Finetuning], ...] = ()
    checkpoints: tuple[Found[str], ...] = ()
    damages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problems: tuple[tuple[str, str], ...] = ()

    @property
    def trained(self) -> Mapping[str, Finetuning]:
        """What is known of the training of checkpoints, by their identity."""
        records = {folder_of(record.path): record.value for record in self.finetunings}
        return {found.sha256: records[found.path] for found in self.checkpoints if found.path in records}

    @property
    def plans_within(self) -> Mapping[str, Found[PruningPlan]]:
        """The plans that checkpoints came of, each in the directory of its own, by the identities of these.

        A plan that is *for* the checkpoint that it lies in says nothing of where that came from.
        """
        return {
            found.sha256: plan
            for found in self.checkpoints
            for plan in self.plans
            if plan.path.rpartition("/")[2] == PLAN
            and folder_of(plan.path) == found.path
            and plan.value.model_sha256 != found.sha256
        }

    @property
    def pruned(self) -> Mapping[str, PruningPlan]:
        """The plans of checkpoints that `prune` wrote, by the identity of these."""
        return {sha256: plan.value for sha256, plan in self.plans_within.items() if sha256 not in self.trained}

    @property
    def own_plans(self) -> tuple[Found[PruningPlan], ...]:
        """Without the copies that `prune` puts into its checkpoints."""
        within = self.plans_within
        copies = {within[sha256].path for sha256 in self.pruned}
        return tuple(found for found in self.plans if found.path not in copies)


def folder_of(path: str) -> str:
    """The folder of a file, as `Found.path` names it.

    >>> folder_of("keep-2/plan.json"), folder_of("plan.json")
    ('keep-2', '.')
    """
    return path.rpartition("/")[0] or "."


def collect(directory: Path, name: str = "", on_progress: Progress = silent) -> Artifacts:
    """Read every artifact below ``directory``, a run called ``name``; hidden folders and links are left alone.

    Every file that a manifest lists is hashed: that takes as long as reading it. ``on_progress`` is told of each file
    and of each model that is hashed.

    Raises:
        UserError: there is no such directory.
    """
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise UserError(
            f"{directory} {found}, expected a directory with artifacts", hint="moe-edge demo -o demo-output"
        )
    finds: dict[str, list[Found[Any]]] = {kind: [] for kind in (*_LOADERS, _STATISTICS, _CHECKPOINT)}
    problems: list[tuple[str, str]] = []
    paths = list(_files(directory, problems))
    for path in counted(paths, "reading artifacts", len(paths), on_progress):
        where = path.relative_to(directory).as_posix()
        try:
            kind = _kind_of(path)
            if kind is not None:
                finds[kind].append(_read(kind, path, directory))
        except (UserError, OSError) as error:
            problems.append((where, error.what if isinstance(error, UserError) else str(error)))
    models = _once(finds["manifest"])
    return Artifacts(
        name=name or directory.resolve().name,
        models=models,
        plans=tuple(finds["plan"]),
        statistics=tuple(finds[_STATISTICS]),
        parities=tuple(finds["parity"]),
        benches=tuple(finds["bench"]),
        finetunings=tuple(finds["finetuning"]),
        checkpoints=tuple(finds[_CHECKPOINT]),
        damages=dict(_damages(directory, counted(models, "checking hashes", len(models), on_progress))),
        problems=tuple(problems),
    )


def _files(directory: Path, problems: list[tuple[str, str]]) -> Iterator[Path]:
    """All but what is hidden; folders that cannot be looked into are added to ``problems``."""

    def note(error: OSError) -> None:
        problems.append((Path(error.filename).relative_to(directory).as_posix(), str(error.strerror)))

    for root, folders, names in os.walk(directory, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and not path.is_symlink():
                yield path


def load_finetuning(path: Path) -> Finetuning:
    """What `finetune` wrote beside a checkpoint.

    Raises:
        UserError: the file is broken, or something else.
    """
    record = load_record(path, "finetuning", 1, "make it again with `moe-edge finetune`")
    return Finetuning(
        method=record.take("method", str),
        model_sha256=record.take("model_sha256", str),
        data_sha256=record.take("data_sha256", str),
        teacher_sha256=record.take("teacher_sha256", str, default=None),
        options=record.take("options", dict),
        recipe=record.take("recipe", dict),
    )


_LOADERS: Mapping[str, Callable[[Path], Any]] = {
    "manifest": lambda path: Manifest.load(path.parent),
    "plan": PruningPlan.load,
    "parity": ParityReport.load,
    "bench": BenchReport.load,
    "finetuning": load_finetuning,
}
"""By what stands at ``artifact`` in the file."""
_STATISTICS, _CHECKPOINT = "statistics", "checkpoint"


def _kind_of(path: Path) -> str | None:
    """What ``path`` is; None for what is no artifact."""
    if path.suffix == ".safetensors":
        return _STATISTICS if holds_statistics(path) else None
    if path.name == "config.json":
        return _CHECKPOINT if is_checkpoint(path.parent) and not (path.parent / FILE_NAME).exists() else None
    if path.suffix != ".json" or path.stat().st_size > _LARGEST_JSON:
        return None
    text = path.read_bytes()
    return next((kind for kind in _LOADERS if f'"artifact": "{kind}"'.encode() in text), None)


def _read(kind: str, path: Path, directory: Path) -> Found[Any]:
    owner = path.parent if kind in ("manifest", _CHECKPOINT) else path
    where = owner.relative_to(directory).as_posix()
    if kind == _CHECKPOINT:
        return Found(where, checkpoint_sha256(path.parent), path.name)
    load = Statistics.load if kind == _STATISTICS else _LOADERS[kind]
    return Found(where, sha256_file(path), load(path))


def _once(models: list[Found[Manifest]]) -> tuple[Found[Manifest], ...]:
    """Each manifest where it lies highest, and not in a bundle, which has a copy of its model's."""
    bundles = {model.path for model in models if model.value.kind == BUNDLE}
    kept: dict[str, Found[Manifest]] = {}
    for model in sorted(models, key=lambda one: (folder_of(one.path) in bundles, one.path.count("/"), one.path)):
        kept.setdefault(model.sha256, model)
    return tuple(sorted(kept.values(), key=lambda model: model.path))


def _damages(directory: Path, models: Iterable[Found[Manifest]]) -> Iterator[tuple[str, str]]:
    for model in models:
        try:
            model.value.check_files(directory / model.path)
        except (UserError, OSError) as error:
            yield model.path, error.what if isinstance(error, UserError) else str(error)
