"""What the measurements amount to: reasons against a candidate, in the order in which one would look for the fault."""

from collections.abc import Sequence

from runtime.report import LayerParity, OutputParity
from runtime.tolerances import Tolerance


def why_it_failed(
    layers: Sequence[LayerParity], outputs: Sequence[OutputParity], allowed: Tolerance
) -> tuple[str, ...]:
    """One sentence for everything that is out of tolerance; empty: it passed."""
    reasons = [reason for layer in layers for reason in _layer(layer, allowed)]
    return (*reasons, *(reason for output in outputs for reason in _output(output, allowed)))


def _layer(layer: LayerParity, allowed: Tolerance) -> list[str]:
    reasons = []
    if layer.faults:
        margin = "without limit" if layer.largest_margin is None else f"up to {layer.largest_margin:.1e}"
        reasons.append(
            f"layer {layer.name}: {layer.faults} of {layer.judged_tokens} tokens select other experts although the "
            f"reference's choice was clear (relative margin {margin}, rounding explains {allowed.margin:.1e})"
        )
    rate = layer.judged_flips / max(layer.judged_tokens, 1)
    if rate > allowed.flips:
        reasons.append(
            f"layer {layer.name}: {layer.judged_flips} of {layer.judged_tokens} tokens select other experts, "
            f"at most {allowed.flips:.0%} may"
        )
    return reasons


def _output(output: OutputParity, allowed: Tolerance) -> list[str]:
    if not output.examples:
        return [f"output {output.name}: every example flipped, so no element could be compared"]
    if output.max_rel is None:
        return [f"output {output.name}: differs by a value that is not finite"]
    if output.max_rel > allowed.element:
        return [
            f"output {output.name}: differs by {output.max_rel:.1e} of its largest magnitude on the {output.examples} "
            f"examples without flips, allowed {allowed.element:.1e}"
        ]
    return []


def first_wrong_layer(layers: Sequence[LayerParity], allowed: Tolerance) -> str | None:
    """The lowest layer whose gates or choices differ by more than rounding; None where all routers agree.

    A router sees what the layers below it made, so the fault lies in this router, or between it and the router below.
    """
    for layer in layers:
        if layer.faults or layer.gate_error is None or layer.gate_error > allowed.margin:
            return layer.name
    return None
