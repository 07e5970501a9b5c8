"""How ``--help`` is laid out: paragraphs that wrap, an example a line, many options in panels."""

import re
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from typer.core import TyperCommand

from cli.completion import complete

_ONNX_RUNTIME = ("threads", "provider", "provider_option", "cpu_fallback", "parallel", "spinning", "cache")
_SHAPES = ("min_shapes", "opt_shapes", "max_shapes", "profile")

PANELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "calibrate": {"Large data, large checkpoints": ("batch_size", "limit", "shard_size", "device_map", "max_memory")},
    "plan": {
        "What else limits the choice": ("floor", "clamp_top_k", "protect", "pretrained", "seed"),
        "On task data": (
            "data", "batch_size", "limit", "rounds", "max_size", "max_latency", "trials", "trust_remote_code",
        ),
    },
    "finetune": {
        "Recipe": (
            "recipe", "learning_rate", "final_learning_rate", "warmup", "momentum", "max_grad_norm", "batch_size",
            "seed",
        ),
        "Of single methods": (
            "score", "variant", "windows", "beta", "floor", "entropy_weight", "top_k", "lower_at", "temperature",
        ),
    },
    "export": {"Files and memory": ("opset", "external_data", "max_memory", "dry_run", "trust_remote_code")},
    "optimize": {
        "Number formats": ("precision", "rest_precision", "block_size", "activations", "calibration", "percentile"),
        "Further graphs": ("forced", "observe_experts"),
        "What is checked": ("clamp_top_k", "any_model", "prove", "allow_partial"),
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
    "bench": {"What is timed": ("repeats", "warmup", "length", "past", "data", "pin"),
              "Against torch": ("against", "checkpoint"), "ONNX Runtime": _ONNX_RUNTIME},
    "run": {
        "Text": ("prompts", "chat", "max_new_tokens", "temperature", "top_p", "seed", "stops"),
        "ONNX Runtime": _ONNX_RUNTIME,
    },
}  # fmt: skip
"""Options by panel by verb; those of no panel are shown first."""

EXAMPLE = "Example: "


class Verb(TyperCommand):
    """A verb with its options in panels, whose values the shell completes."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        panels = PANELS.get(self.name or "", {})
        panel_of = {name: panel for panel, names in panels.items() for name in names}
        parameters: list[Any] = list(self.params)  # typer's own, which have panels
        for parameter in parameters:
            parameter.rich_help_panel = panel_of.get(parameter.name)
            complete(self.name or "", parameter)


def help_text(docstring: str) -> str:
    """A docstring as typer shows it: lines of a paragraph are joined, so that they wrap; examples are not."""
    paragraphs = docstring.strip().split("\n\n")
    return escape("\n\n".join(re.sub(rf"\n(?!{EXAMPLE})", " ", paragraph) for paragraph in paragraphs))
