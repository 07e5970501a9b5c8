"""Options that several commands share."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtime.providers import Execution


class Against(StrEnum):
    """How a checkpoint may run beside the models that are timed."""

    EAGER = "torch"
    COMPILED = "torch.compile"


Output = Annotated[Path, typer.Option("-o", "--output", help="What to write; it must not exist yet.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that config.json names: read them first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
MinShapes = Annotated[list[str] | None, typer.Option("--minShapes", help="Smallest: NAME:DIMxDIM,...")]
OptShapes = Annotated[list[str] | None, typer.Option("--optShapes", help="Shapes to be quick at.")]
MaxShapes = Annotated[list[str] | None, typer.Option("--maxShapes", help="Largest shapes.")]

Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads of one operator; 0: one a core.")]
ProviderName = Annotated[
    str | None,
    typer.Option(
        "--provider", help="ONNX Runtime's: cpu, cuda, tensorrt, tensorrt-rtx, openvino, qnn, coreml, directml."
    ),
]
ProviderOptions = Annotated[
    list[str] | None, typer.Option("--provider-option", help="NAME=VALUE, as ONNX Runtime has them; repeatable.")
]
CpuFallback = Annotated[
    bool, typer.Option("--cpu-fallback", help="Nodes that the provider does not take may run on the CPU.")
]
Parallel = Annotated[
    int, typer.Option("--parallel", min=1, help="ONNX Runtime: operators that may run at once (inter-op threads).")
]
Spinning = Annotated[
    bool, typer.Option("--spinning/--no-spinning", help="ONNX Runtime: whether idle threads wait busily.")
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", help="Directory that keeps what ONNX Runtime makes of a model for the next time."),
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
    from runtime.providers import Execution, parse_options

    return Execution(provider, parse_options(options or ()), cpu_fallback, parallel, spinning, cache)
