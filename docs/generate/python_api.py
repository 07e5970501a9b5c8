"""The pages of the Python API: which object stands where is a table here, what it says of itself is its docstring."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType

FUNCTIONS: Mapping[str, Sequence[str]] = {
    "inspect": ("cli.inspect.inspect",),
    "families": ("models.support.families",),
    "targets": ("runtime.fit.targets",),
    "doctor": ("runtime.doctor.doctor",),
    "upcycle": ("models.upcycle.upcycle",),
    "calibrate": ("pruning.calibrate.calibrate", "graph_passes.calibrate.calibrate"),
    "merge": ("moe_spec.statistics.merge",),
    "plan": ("pruning.plan.plan", "pruning.plan_on_data.plan_on_data", "pruning.by_hand.plan_by_hand"),
    "prune": ("pruning.prune.prune",),
    "finetune": ("pruning.finetuning.finetune.finetune",),
    "export": ("exporter.export.export",),
    "optimize": ("graph_passes.optimize.optimize",),
    "build": ("runtime.build.build",),
    "bundle": ("runtime.bundle.bundle.bundle",),
    "verify": ("cli.judge.judge",),
    "bench": ("runtime.bench.bench",),
    "run": ("runtime.run.run", "runtime.text.answer.answer"),
    "report": ("report.report.report",),
    "demo": ("cli.demo.demo",),
}
"""The plain functions that each verb calls: one, or one for each kind of what it may be given."""

COMMAND_LINE_ONLY = ("inspect", "demo")
"""They put together what several packages offer."""

TAKEN: Mapping[str, Sequence[str]] = {
    "Plans": (
        "pruning.options.PlanOptions",
        "pruning.plan_on_data.DataOptions",
        "pruning.by_hand.parse_experts",
        "pruning.layers.of_checkpoint",
    ),
    "Data": ("moe_spec.dataset.Dataset", "moe_spec.dataset.load_dataset"),
    "Fine-tuning": ("pruning.finetuning.finetune.Finetuning",),
    "Running": ("moe_spec.runner.Runner", "runtime.onnxruntime.backend.OnnxRuntimeRunner"),
    "Errors": ("moe_spec.errors.UserError", "moe_spec.errors.VerificationError"),
    "Any torch module": (
        "models.plain.plain_model",
        "models.moe_block.SparseMoe",
        "models.moe_block.TopKRouter",
        "models.moe_block.StackedExperts",
        "exporter.module.export_module",
    ),
}
"""What the functions take, and what goes with them."""

ARTIFACTS: Mapping[str, Sequence[str]] = {
    "plan.json": ("moe_spec.plan", "moe_spec.layer_plan"),
    "statistics.safetensors": ("moe_spec.statistics",),
    "manifest.json": ("moe_spec.manifest",),
    "parity.json": (
        "runtime.verification.report",
        "runtime.verification.fault",
        "runtime.text.greedy",
        "runtime.verification.tolerances",
    ),
    "bench.json": ("runtime.bench_report", "runtime.bench"),
}
"""The modules of each artifact: it is made of their dataclasses."""


def functions_page() -> str:
    """Every verb as a function, and what they take."""
    parts = [
        "# Python API",
        "Every verb is a plain function, or one for each kind of what it is given, such as a checkpoint and an ONNX "
        "model: paths and options in, an artifact out. None prints, none exits; what a user can mend is a `UserError`.",
        "## Verbs",
        *(_directive(name) for verb in FUNCTIONS if verb not in COMMAND_LINE_ONLY for name in FUNCTIONS[verb]),
    ]
    for title, names in TAKEN.items():
        parts += [f"## {title}", *map(_directive, names)]
    return "\n\n".join(parts) + "\n"


def artifacts_page() -> str:
    """The files that verbs hand to each other, as the dataclasses that read and write them."""
    parts = [
        "# Artifacts",
        "What one verb writes, another reads. JSON files are sorted and indented and carry `artifact` and `schema`; a "
        "schema that this version does not know is refused. Paths in them stay inside their directory.",
    ]
    for title, modules in ARTIFACTS.items():
        names = [name for module in modules for name in dataclasses_of(importlib.import_module(module))]
        parts += [f"## {title}", *(_directive(name, members=False) for name in names)]
    return "\n\n".join(parts) + "\n"


def dataclasses_of(module: ModuleType) -> list[str]:
    """Public dataclasses of ``module``, by their full names, in the order in which they are written.

    >>> import moe_spec.layer_plan
    >>> dataclasses_of(moe_spec.layer_plan)
    ['moe_spec.layer_plan.Merge', 'moe_spec.layer_plan.LayerPlan']
    """
    made = (name for name, thing in vars(module).items() if dataclasses.is_dataclass(thing) and name[0] != "_")
    return [f"{module.__name__}.{name}" for name in made if vars(module)[name].__module__ == module.__name__]


def _directive(name: str, *, members: bool = True) -> str:
    options = "" if members else "\n    options:\n      members: false"
    return f"::: {name}{options}"
