"""Prove that a model computes what it was made from; exit with 3 when it does not.

Both run on the same examples, and their routers are compared first. Rounding makes a token select another expert where
two score almost the same: such a flip is excused where the reference's margin between the two is within rounding.
Outputs are compared where nothing flipped, and with labels the accuracies too.

If a plan was applied to the candidate, its reference is the model before, in which dropped experts cannot be selected;
verify makes that graph itself. Checkpoints are run by torch. The reference is run on the CPU, the candidate on
--provider.

Example: moe-edge verify optimized/ --reference exported/ --data test.npz -o parity.json
Example: moe-edge verify int8/ --reference exported/ --data test.npz
Example: moe-edge verify exported/ --reference checkpoint/
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import (
    AsJson,
    CpuFallback,
    JudgedBy,
    Parallel,
    ProviderName,
    ProviderOptions,
    Spinning,
    Threads,
    TrustRemoteCode,
    execution_of,
    written,
)
from cli.trust import warn_of_code
from moe_spec.errors import VerificationError


def verify(
    candidate: Annotated[Path, typer.Argument(help="Model or engine directory, .onnx file or checkpoint.")],
    reference: Annotated[
        Path, typer.Option(help="What it was made from: model or engine directory, .onnx file or checkpoint.")
    ],
    plan: Annotated[
        Path | None, typer.Option(help="What was applied to the candidate; by default what its manifest says.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help=".npz of model inputs, or of uint8 `images`; with or without `labels`. Random inputs at three "
            "shapes without it."
        ),
    ] = None,
    output: Annotated[Path | None, written("the report, parity.json")] = None,
    precision: JudgedBy = None,
    tolerances: Annotated[
        Path | None, typer.Option(help='JSON file of other tolerances, such as {"int8": {"element": 0.05}}.')
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that are run at once.")] = 32,
    threads: Threads = 0,
    provider: ProviderName = None,
    provider_option: ProviderOptions = None,
    cpu_fallback: CpuFallback = False,
    parallel: Parallel = 1,
    spinning: Spinning = True,
    bisect: Annotated[bool, typer.Option(help="Search a candidate that fails for the part that went wrong.")] = True,
    greedy_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that decoders write, to be compared; 0: none.")
    ] = 16,
    cost: Annotated[bool, typer.Option("--cost", help="Time both, too, and measure their memory.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models, and write parity.json."""
    from cli import parity
    from cli.judge import judge
    from moe_spec.dataset import load_dataset
    from moe_spec.files import refuse_existing
    from moe_spec.identity import is_checkpoint
    from moe_spec.plan import PruningPlan
    from runtime.verification.tolerances import TOLERANCES, load_tolerances, tolerance_of

    if output is not None:
        refuse_existing(output)
    rows = TOLERANCES if tolerances is None else load_tolerances(tolerances)
    tolerance = None if precision is None else tolerance_of(precision, rows)
    given = None if plan is None else PruningPlan.load(plan)
    task = None if data is None else load_dataset(data, candidate, reference)
    checkpoints = (path for path in (candidate, reference) if is_checkpoint(path))
    warn_of_code(*checkpoints, trusted=trust_remote_code)
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
            trust_remote_code=trust_remote_code,
            on_progress=tell,
        )
    if output is not None:
        report.save(output)
    console.result(parity.summary(report), report.to_json(), as_json)
    if not report.passed:
        raise VerificationError("; ".join(parity.reasons(report)))
