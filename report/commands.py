"""The commands that make a run again, read out of what the artifacts say of themselves."""

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moe_spec import formats
from moe_spec.manifest import Manifest
from moe_spec.plan import BY_HAND, BYTES, MILLISECONDS, PruningPlan
from moe_spec.statistics import KEYS
from report.artifacts import Artifacts, Finetuning, Found, folder_of
from report.chain import REFERENCE
from report.names import Names
from report.variants import EXPORTED, OPTIMIZED
from runtime.backend import ENGINE
from runtime.bundle.bundle import KIND as BUNDLE
from runtime.verification.report import ParityReport
from runtime.verification.tolerances import TOLERANCES

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "calibrate": {},
    "plan": {"scope": "layer", "seed": 0, "trials": 100, "rounds": 1, "batch_size": 32, "floor": 1},
    "finetune": {"seed": 0},
    "export": {"opset": 20, "dtype": "fp32", "external_data": 1024},
    "optimize": {"percentile": 100.0},
    "verify": {"greedy_tokens": 16},
    "bench": {"threads": 1},
}
"""What options of the verbs are if they are not given."""
PLANNED = (
    *("keep", "scope", "seed", "clamp_top_k", "router", "protect", "pretrained", "floor", "target"),
    *("rounds", "batch_size", "limit"),
)
"""What among `PruningPlan.options` is an option of `plan` too; other things say what came of it."""
_PRECISION: Mapping[str, str] = {"experts": "precision", "rest": "rest_precision", "block_size": "block_size"}
"""What an option is called that a manifest has under another name."""
BUDGETS = {BYTES: "max_size", MILLISECONDS: "max_latency"}
"""Options for the units of a budget in plan.json."""
_STAGES = (
    "calibrate",
    "merge",
    "plan",
    "prune",
    "finetune",
    "export",
    "optimize",
    "build",
    "bundle",
    "verify",
    "bench",
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: behind ``moe-edge``, the verb first.
        makes: path of what it writes, its ``-o``.
        note: what to know of it.
    """

    words: tuple[str, ...]
    makes: str
    note: str = ""

    @property
    def verb(self) -> str:
        """Of the command line."""
        return self.words[0]

    @property
    def command(self) -> str:
        """The line for a shell."""
        return shlex.join(["moe-edge", *self.words, "-o", self.makes])


def commands(artifacts: Artifacts) -> list[Step]:
    """What makes the artifacts again in an empty directory that has ``Names.outside``, in an order that works."""
    names = Names(artifacts)
    makers = (_calibrate, _plan, _prune, _finetune, _models, _verify, _bench)
    steps = [step for make in makers for step in make(artifacts, names)]
    return _in_order(sorted(steps, key=lambda step: _STAGES.index(step.verb)))


def _in_order(steps: Sequence[Step]) -> list[Step]:
    """Each behind those that make what it reads, and otherwise as they come."""
    left, ordered = list(steps), []
    while left:
        unmade = {step.makes for step in left}
        ready = next((step for step in left if not unmade & {*step.words} - {step.makes}), left[0])
        left.remove(ready)
        ordered.append(ready)
    return ordered


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


def _step(makes: str, *words: object, note: str = "") -> Step:
    return Step(tuple(map(str, words)), makes, note)


def _options(verb: str, values: Mapping[str, Any]) -> list[str]:
    """As options of a verb; those that are what they are by default are left out.

    >>> _options("finetune", {"temperature": 2, "seed": 0, "dense": True, "lower_at": (3, 5), "teacher": None})
    ['--temperature', '2', '--dense', '--lower-at', '3', '--lower-at', '5']
    """
    said: list[str] = []
    for name, value in values.items():
        if value is None or value is False or (name in DEFAULTS[verb] and DEFAULTS[verb][name] == value):
            continue
        option = "--" + name.replace("_", "-")
        several: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
        said += [option] if value is True else [word for one in several for word in (option, str(one))]
    return said


def _calibrate(artifacts: Artifacts, names: Names) -> Iterator[Step]:
    for found in artifacts.statistics:
        statistics = found.value
        model = names.path(statistics.model_sha256)
        is_dense = any(KEYS[key].dense for layer in statistics.layers for key in layer.sums)
        dense = _options("calibrate", {"dense": is_dense})
        shards = [names.data[sha256] for sha256 in statistics.data_sha256]
        parts = [f"{found.path}.{number}.safetensors" for number in range(len(shards))] if shards[1:] else [found.path]
        for data, part in zip(shards, parts, strict=True):
            yield _step(part, "calibrate", model, "--data", data, *dense)
        if len(parts) > 1:
            yield _step(found.path, "merge", *parts)


def _plan(artifacts: Artifacts, names: Names) -> Iterator[Step]:  # noqa: ARG001
    for found in names.plans:
        plan = found.value
        source = names.path(plan.statistics_sha256, names.path(plan.model_sha256))
        said = _by_hand(plan) if plan.criterion == BY_HAND else _ranked(plan, names)
        yield _step(found.path, "plan", source, *said)


def _by_hand(plan: PruningPlan) -> list[str]:
    named = [f"{layer.name}={','.join(map(str, layer.keep))}" for layer in plan.layers]
    return _options("plan", {"experts": named, **_planned(plan)})


def _planned(plan: PruningPlan) -> dict[str, Any]:
    return {key: plan.options[key] for key in PLANNED if key in plan.options}


def _ranked(plan: PruningPlan, names: Names) -> list[str]:
    said = _planned(plan)
    data, budget, search = (plan.options.get(key) for key in ("data_sha256", "budget", "search"))
    if data:
        said = {"data": names.data[data], **said}
    if isinstance(budget, dict) and budget.get("unit") in BUDGETS:
        said |= {"keep": None, BUDGETS[budget["unit"]]: budget.get("written")}
    if isinstance(search, dict):
        said["trials"] = search.get("trials")
    if said.get("pretrained"):
        said["pretrained"] = names.path(str(said["pretrained"]), "PRETRAINED")
    return ["--criterion", plan.criterion, *_options("plan", said)]


def _prune(artifacts: Artifacts, names: Names) -> Iterator[Step]:
    for sha256, plan in artifacts.pruned.items():
        model = names.path(plan.model_sha256)
        yield _step(names.path(sha256), "prune", model, "--plan", names.plan(plan))


def _finetune(artifacts: Artifacts, names: Names) -> Iterator[Step]:
    for found in artifacts.finetunings:
        record, out = found.value, folder_of(found.path)
        said = ["--data", names.data[record.data_sha256], "--method", record.method]
        said += _options("finetune", _training(record))
        if record.teacher_sha256 is not None:
            said += ["--teacher", names.path(record.teacher_sha256)]
        if record.method == "full-router":
            layers = next((plan.value.layers for plan in artifacts.plans if folder_of(plan.path) == out), ())
            said += ["--plan", next((plan.path for plan in names.plans if plan.value.layers == layers), "plan.json")]
        yield _step(out, "finetune", names.path(record.model_sha256), *said)


def _training(record: Finetuning) -> dict[str, Any]:
    """What a training was told; a recipe's decay has no option, it goes with the optimizer."""
    is_sgd = record.recipe.get("optimizer") == "sgd"
    left_out = {"optimizer", "weight_decay"} | (set() if is_sgd else {"momentum"})
    recipe = {key: value for key, value in record.recipe.items() if key not in left_out}
    return {**record.options, "recipe": "router-norm-cifar" if is_sgd else None, **recipe}


def _models(artifacts: Artifacts, names: Names) -> Iterator[Step]:
    there = {model.sha256: model for model in artifacts.models}
    for model in artifacts.models:
        make = _BY_KIND.get(model.value.kind)
        if make is not None:
            yield make(model, there.get(model.value.parent_sha256), names)


def _plan_of(manifest: Manifest, parent: Found[Manifest] | None, names: Names) -> list[str]:
    """``--plan``, where it was not carried out before."""
    is_new = manifest.plan is not None and (parent is None or parent.value.plan != manifest.plan)
    return ["--plan", names.plan(manifest.plan)] if is_new and manifest.plan is not None else []


def _export(model: Found[Manifest], parent: Found[Manifest] | None, names: Names) -> Step:
    manifest = model.value
    dtype = manifest.details.get("dtype")
    named = formats.said(dtype) if isinstance(dtype, str) else None
    asked = {key: manifest.details.get(key) for key in ("opset", "task", "external_data")}
    own_code = bool(manifest.details.get("own_code"))
    said = _options("export", {**asked, "dtype": named, "trust_remote_code": own_code})
    said += ["--no-cache"] if manifest.details.get("cache") is False else []
    source = names.path(manifest.parent_sha256)
    return _step(model.path, "export", source, *_plan_of(manifest, parent, names), *said)


def _optimize(model: Found[Manifest], parent: Found[Manifest] | None, names: Names) -> Step:
    manifest, details = model.value, model.value.details
    forms = {block.form for block in manifest.blocks}
    said: dict[str, Any] = {"form": forms.pop() if len(forms) == 1 and manifest.modified else None}
    asked = details.get("precision")
    said |= {_PRECISION[key]: asked.get(key) for key in _PRECISION} if isinstance(asked, dict) else {}
    rounded = details.get("activations")
    if isinstance(rounded, dict):
        data = names.data.get(str(rounded.get("data_sha256")), "DATA.npz")
        said |= {"activations": rounded.get("format"), "calibration": data, "percentile": rounded.get("percentile")}
    said |= {"forced": bool(details.get("forced")), "observe_experts": bool(details.get("experts"))}
    said_plan = _plan_of(manifest, parent, names)
    said |= {"allow_partial": bool(details.get("left_alone"))}
    said |= {"any_model": bool(said_plan) and _is_of_another(manifest, parent)}
    unproven = ["--no-prove"] if manifest.modified and not details.get("oracle", ["unknown"]) else []
    source = names.path(manifest.parent_sha256)
    note = "layers have several forms: give the --target that they were chosen for" if len(forms) > 1 else ""
    return _step(model.path, "optimize", source, *said_plan, *_options("optimize", said), *unproven, note=note)


def _is_of_another(manifest: Manifest, parent: Found[Manifest] | None) -> bool:
    """Whether its plan was made for another file of the model, which `optimize` takes where it is told to."""
    own = {manifest.source_sha256} | (set() if parent is None else {parent.value.model_sha256})
    is_known = parent is not None or manifest.parent_sha256 == manifest.source_sha256
    return is_known and manifest.plan is not None and manifest.plan.model_sha256 not in own


def _build(model: Found[Manifest], parent: Found[Manifest] | None, names: Names) -> Step:  # noqa: ARG001
    details = model.value.details
    given: Sequence[Any] = details.get("arguments", ())
    arguments = [word for argument in given if isinstance(argument, str) for word in argument.split()]
    source = names.path(model.value.parent_sha256)
    return _step(model.path, "build", source, "--target", details.get("target", "TARGET"), *arguments)


def _bundle(model: Found[Manifest], parent: Found[Manifest] | None, names: Names) -> Step:  # noqa: ARG001
    source, target = names.path(model.value.parent_sha256), model.value.details.get("target", "TARGET")
    return _step(model.path, "bundle", source, "--target", target)


_BY_KIND = {EXPORTED: _export, OPTIMIZED: _optimize, ENGINE: _build, BUNDLE: _bundle}


def _verify(artifacts: Artifacts, names: Names) -> Iterator[Step]:
    masked = {model.sha256: model.value for model in artifacts.models if model.value.kind == REFERENCE}
    for found in artifacts.parities:
        report = found.value
        against = report.reference_sha256
        if against in masked:
            against = masked[against].parent_sha256  # `verify` masks the parent itself
        words = (names.path(report.candidate_sha256), "--reference", names.path(against))
        said = {"data": names.data[report.data_sha256]} if report.data_sha256 else {}
        yield _step(found.path, "verify", *words, *_options("verify", {**said, **_judging(report)}))


def _judging(report: ParityReport) -> dict[str, Any]:
    """What a verification was told of how to judge."""
    rows = (name for name, tolerance in TOLERANCES.items() if tolerance == report.tolerance)
    as_given = next(rows, None) if report.precision not in TOLERANCES else None
    tokens = None if report.greedy is None else report.greedy.tokens
    return {"precision": as_given, "greedy_tokens": tokens, "cost": bool(report.cost)}


def _bench(artifacts: Artifacts, names: Names) -> Iterator[Step]:
    for found in artifacts.benches:
        rows, hashes = found.value.rows, found.value.models
        models = [names.path(hashes[row.model], row.model) for row in rows if row.model in hashes]
        said = {"batch_size": list(dict.fromkeys(row.batch_size for row in rows)), "threads": found.value.threads}
        said |= {"no_pin": found.value.threads > 0 and not found.value.cores}
        yield _step(found.path, "bench", *dict.fromkeys(models), *_options("bench", said), note=found.value.machine)
