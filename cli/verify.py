"""Prove that a candidate computes what its reference computes; exit with 3 when it does not.

Where a plan was applied to the candidate, its reference is the parent model with the dropped experts made unselectable;
that graph is made on the fly. Checkpoints are run by torch. Without --data both see random feeds at three shapes.

--provider says what ONNX Runtime computes the candidate on; the reference is computed on the CPU.

Example: moe-edge verify optimized/ --reference exported/ --data test.npz -o parity.json
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import (
    AsJson,
    CpuFallback,
    Parallel,
    ProviderName,
    ProviderOptions,
    Spinning,
    Threads,
    execution_of,
)
from moe_spec.errors import VerificationError


def verify(
    candidate: Annotated[Path, typer.Argument(help="Model or engine directory, .onnx file or checkpoint.")],
    reference: Annotated[
        Path, typer.Option(help="What it was made from: model or engine directory, .onnx file or checkpoint.")
    ],
    plan: Annotated[Path | None, typer.Option(help="plan.json; by default that in the candidate's manifest.")] = None,
    data: Annotated[Path | None, typer.Option(help=".npz of model inputs or images, with or without labels.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="parity.json; it must not exist yet.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Judge as float32, float16, bfloat16, int8, float8e4m3fn, w8a8, float4e2m1, int4."),
    ] = None,
    tolerances: Annotated[Path | None, typer.Option(help='Other tolerances: {"int8": {"element": 0.05}}.')] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that are run at once.")] = 32,
    threads: Threads = 0,
    provider: ProviderName = None,
    provider_option: ProviderOptions = None,
    cpu_fallback: CpuFallback = False,
    parallel: Parallel = 1,
    spinning: Spinning = True,
    bisect: Annotated[bool, typer.Option(help="Search a failing candidate for the part that went wrong.")] = True,
    greedy_tokens: Annotated[int, typer.Option(min=0, help="Tokens that decoders write to be compared; 0: none.")] = 16,
    cost: Annotated[bool, typer.Option("--cost", help="Time both, too, and measure their memory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that a candidate computes what its reference computes; exit with 3 when it does not.

    Example: moe-edge verify optimized/ --reference exported/ --data test.npz -o parity.json
    """
    from cli import parity
    from cli.judge import judge
    from cli.sides import home
    from moe_spec.dataset import load_dataset
    from moe_spec.files import refuse_existing
    from moe_spec.images import ImagePreprocessor
    from moe_spec.plan import PruningPlan
    from runtime.verification.tolerances import TOLERANCES, load_tolerances, tolerance_of

    if output is not None:
        refuse_existing(output)
    rows = TOLERANCES if tolerances is None else load_tolerances(tolerances)
    tolerance = None if precision is None else tolerance_of(precision, rows)
    given = None if plan is None else PruningPlan.load(plan)
    preprocessors = (ImagePreprocessor.load(home(path)) for path in (candidate, reference))
    preprocessor = next((found for found in preprocessors if found is not None), None)
    task = None if data is None else load_dataset(data, preprocessor)
    with console.progress(f"opening {candidate}") as tell:
        report = judge(
            candidate,
            reference,
            plan=given,
            data=task,
            tolerance=tolerance,
            tolerances=rows,
            batch_size=batch_size,
            threads=threads,
            execution=execution_of(provider, provider_option, cpu_fallback, parallel, spinning, None),
            bisect=bisect,
            greedy_tokens=greedy_tokens,
            cost=cost,
            on_progress=tell,
        )
    if output is not None:
        report.save(output)
    console.result(parity.summary(report), report.to_json(), as_json)
    if not report.passed:
        raise VerificationError("; ".join(parity.reasons(report)))
