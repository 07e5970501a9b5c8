"""Options that several commands share."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from runtime.execution import Execution


class Against(StrEnum):
    """How a checkpoint may run beside the models that are timed."""

    EAGER = "torch"
    COMPILED = "torch.compile"


Output = Annotated[Path, typer.Option("-o", "--output", help="What to write; it must not exist yet.")]


def written(what: str) -> Any:
    """``-o`` of a verb that prints what it found, and writes ``what`` as well where it is told to."""
    return typer.Option("-o", "--output", help=f"Write {what}; it must not exist yet. Nothing is written without it.")


BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="onnxruntime, tensorrt or tensorrt-rtx, where a target's name is in several; by default its first.",
    ),
]
JudgedBy = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="Tolerances to judge by: fp32, fp16, bf16, int8, fp8, w8a8, nvfp4 or int4; by default those of the "
        "coarsest format that is there.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python files that the checkpoint's config.json names. Read them first."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
MinShapes = Annotated[
    list[str] | None,
    typer.Option("--minShapes", metavar="SHAPES", help="Smallest shapes that the inputs may have: NAME:DIMxDIM,..."),
]
OptShapes = Annotated[
    list[str] | None, typer.Option("--optShapes", metavar="SHAPES", help="Shapes that the engine is to be quick at.")
]
MaxShapes = Annotated[list[str] | None, typer.Option("--maxShapes", metavar="SHAPES", help="Largest shapes.")]

Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads of one operator; 0: one for each core.")]
ProviderName = Annotated[
    str | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="What computes: cpu, cuda, tensorrt, tensorrt-rtx, openvino, qnn, coreml or directml. By default cpu, or "
        "what an engine was built for.",
    ),
]
ProviderOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--provider-option", metavar="NAME=VALUE", help="An option of that provider, as ONNX Runtime names it."
    ),
]
CpuFallback = Annotated[
    bool,
    typer.Option(
        "--cpu-fallback", help="Let nodes that the provider does not take run on the CPU; without it they are an error."
    ),
]
Parallel = Annotated[int, typer.Option("--parallel", min=1, help="Operators that may run at once (inter-op threads).")]
Spinning = Annotated[
    bool,
    typer.Option("--spinning/--no-spinning", help="Whether idle threads wait busily: quicker, but they take the CPU."),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Directory that keeps what ONNX Runtime makes of a model, for the next start; nothing is kept without it.",
    ),
]


def execution_of(
    provider: str | None,
    options: Sequence[str] | None,
    cpu_fallback: bool,
    parallel: int,
    spinning: bool,
    cache: Path | None,
) -> "Execution":
    """What these options say together.

    Raises:
        UserError: an unknown provider, or an option that it does not take.
    """
    from runtime.execution import Execution, parse_options

    return Execution(provider, parse_options(options or ()), cpu_fallback, parallel, spinning, cache)
