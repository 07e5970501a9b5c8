"""The commands that make a run again, read out of what the artifacts say of themselves."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_spec.manifest import Manifest
from report.artifacts import Artifacts, Found, folder_of
from report.variants import EXPORTED, OPTIMIZED
from report.words import short
from runtime.backend import ENGINE
from runtime.bundle.bundle import KIND as BUNDLE

DATA, CHECKPOINT = "DATA.npz", "CHECKPOINT"
"""What lies outside the directory; their hashes stand beside them."""

_DEFAULTS: Mapping[str, Any] = {"scope": "layer", "seed": 0, "floor": 1, "rounds": 1}
_PRECISION: Mapping[str, str] = {"experts": "precision", "rest": "rest_precision", "block_size": "block_size"}
"""What an option is called that a manifest has under another name."""
_STAGES = ("calibrate", "plan", "finetune", "export", "optimize", "build", "bundle", "verify", "bench")

Step = tuple[str, str, str]
"""Verb, command, and what to know of it."""


def commands(artifacts: Artifacts) -> list[Step]:
    """In the order of the way through; run from within the directory's parent they take other names for -o."""
    names = _Names(artifacts)
    makers = (_calibrate, _plan, _finetune, _models, _verify, _bench)
    steps = [step for make in makers for step in make(artifacts, names)]
    return sorted(steps, key=lambda step: _STAGES.index(step[0]))


def missing(artifacts: Artifacts) -> list[tuple[str, str]]:
    """The stages that left nothing here, and the command for each."""
    kinds = {model.value.kind for model in artifacts.models}
    there: Mapping[str, bool] = {
        "moe-edge calibrate CHECKPOINT --data DATA.npz -o statistics.safetensors": bool(artifacts.statistics),
        "moe-edge plan statistics.safetensors --keep 50% -o plan.json": bool(artifacts.plans)
        or any(model.value.plan for model in artifacts.models),
        "moe-edge export CHECKPOINT -o exported": EXPORTED in kinds,
        "moe-edge optimize exported --plan plan.json -o optimized": OPTIMIZED in kinds,
        "moe-edge build optimized --target TARGET -o engine": ENGINE in kinds,
        "moe-edge verify optimized --reference exported --data DATA.npz -o parity.json": bool(artifacts.parities),
        "moe-edge bench exported optimized -o bench.json": bool(artifacts.benches),
    }
    return [(command.split()[1], command) for command, is_there in there.items() if not is_there]


class _Names:
    """What artifacts are called in a command, by their hash."""

    def __init__(self, artifacts: Artifacts) -> None:
        finds: tuple[Found[Any], ...] = (*artifacts.models, *artifacts.checkpoints, *artifacts.statistics)
        self._paths = {found.sha256: found.path for found in finds}
        self._plans = artifacts.plans

    def path(self, sha256: str | None, otherwise: str) -> str:
        return self._paths.get(sha256 or "", otherwise)

    def plan(self, manifest: Manifest) -> list[str]:
        if manifest.plan is None:
            return []
        found = next((plan.path for plan in self._plans if plan.value == manifest.plan), "plan.json")
        return ["--plan", found]


def _line(*words: object) -> str:
    return shlex.join(["moe-edge", *map(str, words)])


def _options(values: Mapping[str, Any]) -> list[str]:
    """As options of the command line; those that are what they are by default are left out."""
    said: list[str] = []
    for name, value in values.items():
        if value in (None, False) or (name in _DEFAULTS and _DEFAULTS[name] == value):
            continue
        option = "--" + name.replace("_", "-")
        said += [option] if value is True else [option, str(value)]
    return said


def _calibrate(artifacts: Artifacts, names: _Names) -> Iterator[Step]:
    for found in artifacts.statistics:
        model = names.path(found.value.model_sha256, CHECKPOINT)
        data = ", ".join(short(sha256) for sha256 in found.value.data_sha256)
        yield "calibrate", _line("calibrate", model, "--data", DATA, "-o", found.path), f"data {data}"


def _plan(artifacts: Artifacts, names: _Names) -> Iterator[Step]:
    trained = {folder_of(record.path) for record in artifacts.finetunings}
    for found in artifacts.plans:
        plan = found.value
        if folder_of(found.path) in trained:
            continue  # `finetune` left it
        source = names.path(plan.statistics_sha256, names.path(plan.model_sha256, CHECKPOINT))
        said = _options({**plan.options, "pretrained": plan.options.get("pretrained") and "PRETRAINED"})
        yield "plan", _line("plan", source, "--criterion", plan.criterion, *said, "-o", found.path), ""


def _finetune(artifacts: Artifacts, names: _Names) -> Iterator[Step]:
    for found in artifacts.finetunings:
        record, out = found.value, folder_of(found.path)
        model = names.path(record.model_sha256, CHECKPOINT)
        wanted = ("steps", "batch_size", "learning_rate")
        said = _options({key: record.recipe[key] for key in wanted if key in record.recipe})
        line = _line("finetune", model, "--data", DATA, "--method", record.method, *said, "-o", out)
        yield "finetune", line, "finetuning.json has every option"


def _models(artifacts: Artifacts, names: _Names) -> Iterator[Step]:
    for model in artifacts.models:
        make = _BY_KIND.get(model.value.kind)
        if make is not None:
            yield make(model, names)


def _export(model: Found[Manifest], names: _Names) -> Step:
    parent = names.path(model.value.parent_sha256, CHECKPOINT)
    return "export", _line("export", parent, *names.plan(model.value), "-o", model.path), ""


def _optimize(model: Found[Manifest], names: _Names) -> Step:
    manifest = model.value
    forms = {block.form for block in manifest.blocks}
    form = ["--form", forms.pop()] if len(forms) == 1 and manifest.modified else []
    asked = manifest.details.get("precision")
    said = (
        _options({_PRECISION[key]: asked[key] for key in _PRECISION if key in asked}) if isinstance(asked, dict) else []
    )
    parent = names.path(manifest.parent_sha256, "EXPORTED")
    return "optimize", _line("optimize", parent, *names.plan(manifest), *form, *said, "-o", model.path), ""


def _build(model: Found[Manifest], names: _Names) -> Step:
    manifest = model.value
    parent, target = names.path(manifest.parent_sha256, "OPTIMIZED"), manifest.details.get("target", "TARGET")
    given: Sequence[Any] = manifest.details.get("arguments", ())
    arguments = [word for argument in given if isinstance(argument, str) for word in argument.split()]
    return "build", _line("build", parent, "--target", target, *arguments, "-o", model.path), ""


def _bundle(model: Found[Manifest], names: _Names) -> Step:
    parent, target = names.path(model.value.parent_sha256, "OPTIMIZED"), model.value.details.get("target", "TARGET")
    return "bundle", _line("bundle", parent, "--target", target, "-o", model.path), ""


_BY_KIND = {EXPORTED: _export, OPTIMIZED: _optimize, ENGINE: _build, BUNDLE: _bundle}


def _verify(artifacts: Artifacts, names: _Names) -> Iterator[Step]:
    parents = {model.sha256: model.value.parent_sha256 for model in artifacts.models}
    for found in artifacts.parities:
        report = found.value
        candidate = names.path(report.candidate_sha256, "CANDIDATE")
        parent = names.path(parents.get(report.candidate_sha256), "EXPORTED")
        reference = names.path(report.reference_sha256, parent)
        data = ["--data", DATA] if report.data_sha256 else []
        note = f"data {short(report.data_sha256)}" if report.data_sha256 else report.data
        yield "verify", _line("verify", candidate, "--reference", reference, *data, "-o", found.path), note


def _bench(artifacts: Artifacts, names: _Names) -> Iterator[Step]:
    for found in artifacts.benches:
        rows, hashes = found.value.rows, found.value.models
        models = [names.path(hashes[row.model], row.model) for row in rows if row.model in hashes]
        sizes = [word for size in dict.fromkeys(row.batch_size for row in rows) for word in ("--batch-size", str(size))]
        yield "bench", _line("bench", *dict.fromkeys(models), *sizes, "-o", found.path), found.value.machine
