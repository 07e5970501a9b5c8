"""Prove that a candidate computes what its reference computes; exit with 3 when it does not.

Where a plan was applied to the candidate, its reference is the parent model with the dropped experts made unselectable;
that graph is made on the fly. Without --data both see random feeds at three shapes.

--provider says what ONNX Runtime computes the candidate on; the reference is computed on the CPU.

Example: moe-edge verify optimized/ --reference exported/ --data test.npz -o parity.json
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from runtime.report import LayerParity, OutputParity, ParityReport


def verify(
    candidate: Annotated[Path, typer.Argument(help="Model or engine directory, or an .onnx file.")],
    reference: Annotated[
        Path, typer.Option(help="What it was made from: a model directory, .onnx file or checkpoint.")
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
    from cli.judge import home, judge
    from moe_spec.dataset import load_dataset
    from moe_spec.files import refuse_existing
    from moe_spec.images import ImagePreprocessor
    from moe_spec.plan import PruningPlan
    from runtime.tolerances import TOLERANCES, load_tolerances, tolerance_of

    if output is not None:
        refuse_existing(output)
    rows = TOLERANCES if tolerances is None else load_tolerances(tolerances)
    tolerance = None if precision is None else tolerance_of(precision, rows)
    given = None if plan is None else PruningPlan.load(plan)
    preprocessors = (ImagePreprocessor.load(home(path)) for path in (candidate, reference))
    preprocessor = next((found for found in preprocessors if found is not None), None)
    task = None if data is None else load_dataset(data, preprocessor)
    with console.status(f"verifying {candidate}"):
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
        )
    if output is not None:
        report.save(output)
    console.result(_summary(report), report.to_json(), as_json)
    if not report.passed:
        raise VerificationError("; ".join([*report.reasons, _place(report)]))


def _summary(report: "ParityReport") -> str:
    verdict = "PASS" if report.passed else "FAIL"
    flips = "flips not observable" if report.flips is None else f"{report.flips} flips"
    summary = f"{verdict}: {report.examples} examples of {report.data}, {report.precision}, {flips}"
    if report.accuracy is not None:
        summary += f", accuracy {report.accuracy.candidate:.1%} (reference {report.accuracy.reference:.1%})"
    layers = [_layer(layer) for layer in report.layers or ()]
    outputs = [_output(output) for output in _worst_of_cache(report.outputs)]
    notes = [f"  note: {note}" for note in report.notes]
    return "\n".join([summary, *layers, *outputs, *_interval(report), *_greedy(report), *_cost(report), *notes])


def _interval(report: "ParityReport") -> list[str]:
    if report.accuracy is None:
        return []
    low, high = (f"{100 * bound:+.1f}" for bound in (report.accuracy.low, report.accuracy.high))
    return [f"  accuracy: changes by {low} to {high} points, with 95 % confidence"]


def _greedy(report: "ParityReport") -> list[str]:
    greedy = report.greedy
    if greedy is None:
        return []
    return [
        f"  greedy: {greedy.mean:.1f} of {greedy.tokens} tokens are the same on average, at least {greedy.shortest}, "
        f"behind {greedy.prompts} prompts"
    ]


def _cost(report: "ParityReport") -> list[str]:
    return [
        f"  {f'{row.model} {row.phase}'.rstrip()}: {row.median_ms:.3f} ms for {row.batch_size} examples, "
        f"{console.mebibytes(row.memory_bytes)} MiB RAM, {row.file_bytes:,} bytes"
        for row in report.cost
    ]


def _worst_of_cache(outputs: Sequence["OutputParity"]) -> "list[OutputParity]":
    """A cache is an output for each tensor of each layer: one of them is shown."""
    from moe_spec.decoder import PRESENT

    kept = [output for output in outputs if output.name.startswith(PRESENT)]
    shown = [output for output in outputs if output not in kept]
    return shown + sorted(kept, key=lambda output: math.inf if output.max_rel is None else output.max_rel)[-1:]


def _layer(layer: "LayerParity") -> str:
    return (
        f"  {layer.name}: {layer.flips} of {layer.tokens} tokens flip, {layer.faults} without excuse, "
        f"agreement {layer.agreement:.4f}, gates differ by {_number(layer.gate_error)}"
    )


def _output(output: "OutputParity") -> str:
    forced = (
        "" if output.forced_max_rel is None else f"{_number(output.forced_max_rel)} under the reference's routing, "
    )
    return (
        f"  {output.name}: differs by {_number(output.max_rel)} on {output.examples} examples without flips, {forced}"
        f"cosine {_number(output.cosine)}, KL {_number(output.kl)}, same top-1 {_number(output.top1_agreement)}, "
        f"ESAP {_number(output.esap)}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _place(report: "ParityReport") -> str:
    if report.fault is not None:
        return f"the fault is in {report.fault.place}: {report.fault.says}"
    if report.first_wrong_layer is None:
        return "the routers of all layers agree"
    return f"the first layer that went wrong is {report.first_wrong_layer}"
