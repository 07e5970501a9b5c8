"""What reports of parity and of cost say to people."""

from collections.abc import Sequence

from cli import console
from runtime.bench import BenchRow
from runtime.verification.report import LayerParity, OutputParity, ParityReport


def summary(report: ParityReport) -> str:
    """The verdict, and a line for every layer and output that was compared."""
    verdict = "PASS" if report.passed else "FAIL"
    flips = "flips not observable" if report.flips is None else f"{report.flips} flips"
    summary = f"{verdict}: {report.examples} examples of {report.data}, {report.precision}, {flips}"
    if report.accuracy is not None:
        summary += f", accuracy {report.accuracy.candidate:.1%} (reference {report.accuracy.reference:.1%})"
    layers = [_layer(layer) for layer in report.layers or ()]
    outputs = [_output(output) for output in report.telling_outputs]
    notes = [f"  note: {note}" for note in report.notes]
    return "\n".join([summary, *layers, *outputs, *_interval(report), *_greedy(report), *cost(report.cost), *notes])


def reasons(report: ParityReport) -> list[str]:
    """Why it failed, and where the fault is."""
    return [*report.reasons, _place(report)]


def cost(rows: Sequence[BenchRow]) -> list[str]:
    """A line for each model, batch size and phase that was timed."""
    return [
        f"  {f'{row.model} {row.phase}'.rstrip()}: {row.median_ms:.3f} ms for {row.batch_size} examples, "
        f"{console.mebibytes(row.memory_bytes)} MiB RAM, {row.file_bytes:,} bytes"
        for row in rows
    ]


def _interval(report: ParityReport) -> list[str]:
    if report.accuracy is None:
        return []
    low, high = (f"{100 * bound:+.1f}" for bound in (report.accuracy.low, report.accuracy.high))
    return [f"  accuracy: changes by {low} to {high} points, with 95 % confidence"]


def _greedy(report: ParityReport) -> list[str]:
    return [] if report.greedy is None else [f"  greedy: {report.greedy.says}"]


def _layer(layer: LayerParity) -> str:
    return (
        f"  {layer.name}: {layer.flips} of {layer.tokens} tokens flip, {layer.faults} without excuse, "
        f"agreement {layer.agreement:.4f}, gates differ by {_number(layer.gate_error)}"
    )


def _output(output: OutputParity) -> str:
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


def _place(report: ParityReport) -> str:
    if report.fault is not None:
        return f"the fault is in {report.fault.place}: {report.fault.says}"
    if report.first_wrong_layer is None:
        return "the routers of all layers agree"
    return f"the first layer that went wrong is {report.first_wrong_layer}"
