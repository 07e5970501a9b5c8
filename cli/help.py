"""How ``--help`` is laid out: paragraphs that wrap, an example a line, options in panels, in the order of a reader."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from cli.completion import complete
from cli.help_page import EXAMPLE, Row, is_argument, row, show, usage, verb_row

_ONNX_RUNTIME = ("threads", "provider", "provider_option", "cpu_fallback", "parallel", "spinning", "cache")
_SHAPES = ("min_shapes", "opt_shapes", "max_shapes", "profile")

PANELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "calibrate": {"Large data, large checkpoints": ("batch_size", "limit", "shard_size", "device_map", "max_memory")},
    "plan": {
        "What else decides": ("router", "floor", "protect", "target", "clamp_top_k", "pretrained", "seed"),
        "On task data": ("data", "max_size", "max_latency", "rounds", "trials", "batch_size", "limit"),
    },
    "finetune": {
        "Recipe": (
            "recipe", "steps", "batch_size", "learning_rate", "warmup", "final_learning_rate", "momentum",
            "max_grad_norm", "seed",
        ),
        "--method full-router": ("plan",),
        "--method task-specific": ("score", "variant", "windows", "beta", "floor"),
        "--method seer": ("entropy_weight", "top_k", "lower_at"),
        "--method router-kd": ("teacher", "temperature"),
    },
    "export": {"Files and memory": ("external_data", "max_memory", "dry_run")},
    "optimize": {
        "Number formats": ("precision", "rest_precision", "block_size", "activations", "calibration", "percentile"),
        "What is checked": ("prove", "allow_partial", "any_model", "clamp_top_k"),
        "Further graphs": ("forced", "observe_experts"),
    },
    "build": {
        "Shapes": _SHAPES,
        "TensorRT": (
            "workspace", "optimization_level", "weight_streaming", "timing_cache", "version_compatible",
            "hardware_compatibility",
        ),
    },
    "bundle": {"Shapes": _SHAPES},
    "verify": {
        "Verdict": ("precision", "tolerances", "bisect", "greedy_tokens", "cost"),
        "ONNX Runtime": _ONNX_RUNTIME,
    },
    "bench": {
        "What is timed": ("data", "length", "past", "repeats", "warmup", "pin"),
        "Against torch": ("against", "checkpoint"),
        "ONNX Runtime": _ONNX_RUNTIME,
    },
    "run": {
        "Text": ("prompts", "chat", "max_new_tokens", "stops", "temperature", "top_k", "top_p", "seed"),
        "ONNX Runtime": _ONNX_RUNTIME,
    },
}  # fmt: skip
"""Options by panel by verb, in the order in which they are shown; those of no panel come first."""

_PANEL = {True: "Arguments", False: "Options"}

_SHOWN = {"bool": "", "int": "INT", "float": "FLOAT", "path": "PATH", "str": "TEXT"}
"""What a value is called, by the name of its type; a switch has none."""


class Verbs(TyperGroup):
    """The command with its verbs."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options and typer's, `--help` too."""
        return [_named(one) for one in super().get_params(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - it is printed, not formatted
        """Print it: options, then verbs by group."""
        commands: Mapping[str, Any] = self.commands  # of ours, which have panels
        verbs = [(command.rich_help_panel, verb_row(name, command)) for name, command in commands.items()]
        panels = _by_panel([("Options", row(one)) for one in self.get_params(ctx)] + verbs)
        show(f"{usage(ctx.command_path, ())} VERB ...", self.help or "", panels)


class Verb(TyperCommand):
    """A verb with its options in panels, whose values the shell completes."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        panels = PANELS.get(self.name or "", {})
        panel_of = {name: panel for panel, names in panels.items() for name in names}
        parameters: list[Any] = list(self.params)  # typer's own, which have panels
        for parameter in parameters:
            parameter.rich_help_panel = panel_of.get(parameter.name)
            parameter.help += " Repeatable." if parameter.multiple else ""
            complete(self.name or "", _named(parameter))
        order = [name for names in panels.values() for name in names]
        self.params = sorted(parameters, key=lambda one: order.index(one.name) + 1 if one.name in order else 0)

    def get_params(self, ctx: Any) -> list[Any]:
        """What it takes, `--help` too."""
        return [_named(one) for one in super().get_params(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - it is printed, not formatted
        """Print it: arguments, options, options by panel."""
        named = [(one.rich_help_panel or _PANEL[is_argument(one)], row(one)) for one in self.get_params(ctx)]
        panels = _by_panel(sorted(named, key=lambda found: found[0] in PANELS.get(self.name or "", {})))
        show(usage(ctx.command_path, self.params), self.help or "", panels)


def _by_panel(rows: Iterable[tuple[str, Row]]) -> Mapping[str, Sequence[Row]]:
    panels: dict[str, list[Row]] = {}
    for panel, found in rows:
        panels.setdefault(panel, []).append(found)
    return panels


def _named(parameter: Any) -> Any:
    """``parameter``, whose value is shown as people call it: PATH, not <path>; nothing for a switch."""
    if parameter.param_type_name == "argument":
        shown, parameter.metavar = "", parameter.metavar or parameter.name.upper()
    else:
        kind = re.search("|".join(_SHOWN), str(parameter.type_descriptor.annotation).lower())
        shown = _SHOWN[kind[0]] if kind else "NAME"
    parameter.display_type = lambda _context: shown
    return parameter


def help_text(docstring: str) -> str:
    """A docstring as typer shows it: lines of a paragraph are joined, so that they wrap; examples are not."""
    paragraphs = docstring.strip().split("\n\n")
    return "\n\n".join(re.sub(rf"\n(?!{EXAMPLE})", " ", paragraph) for paragraph in paragraphs)
