"""What the measurements amount to: reasons against a candidate, in the order in which one would look for the fault."""

from collections.abc import Sequence

from runtime.parity import say_moved
from runtime.verification.report import LayerParity, OutputParity, TaskAccuracy
from runtime.verification.tolerances import Tolerance


def why_it_failed(
    layers: Sequence[LayerParity],
    outputs: Sequence[OutputParity],
    accuracy: TaskAccuracy | None,
    allowed: Tolerance,
    *,
    forced: bool = False,
) -> tuple[str, ...]:
    """One sentence for everything that is out of tolerance; empty: it passed.

    ``forced`` says whether the candidate was also run with the reference's routing.
    """
    reasons = [reason for layer in layers for reason in _layer(layer, allowed)]
    reasons += [reason for output in outputs for reason in _output(output, forced, allowed)]
    return (*reasons, *_accuracy(accuracy, allowed))


def _layer(layer: LayerParity, allowed: Tolerance) -> list[str]:
    reasons = []
    if layer.faults:
        margin = "without limit" if layer.largest_margin is None else f"up to {layer.largest_margin:.1e}"
        reasons.append(
            f"layer {layer.name}: {layer.faults} of {layer.judged_tokens} tokens select other experts although the "
            f"reference's choice was clear (relative margin {margin}, rounding explains {allowed.margin:.1e})"
        )
    elif layer.moved:  # in a coarse format margins may excuse what is none of rounding's doing
        reasons.append(f"layer {layer.name}: its router {say_moved(layer.moved)}")
    rate = layer.judged_flips / max(layer.judged_tokens, 1)
    if rate > allowed.flips:
        reasons.append(
            f"layer {layer.name}: {layer.judged_flips} of {layer.judged_tokens} tokens select other experts, "
            f"at most {allowed.flips:.0%} may"
        )
    return reasons


def _output(output: OutputParity, forced: bool, allowed: Tolerance) -> list[str]:
    if not output.examples and not forced:
        return [f"output {output.name}: every example flipped, so no element could be compared"]
    measured = [(output.max_rel, f"on the {output.examples} examples without flips")] if output.examples else []
    if forced:
        measured.append((output.forced_max_rel, "where the reference's routers choose the experts"))
    if any(error is None for error, _ in measured):
        return [f"output {output.name}: differs by a value that is not finite"]
    return [
        f"output {output.name}: differs by {error:.1e} of its largest magnitude {where}, allowed {allowed.element:.1e}"
        for error, where in measured
        if error is not None and error > allowed.element
    ]


def _accuracy(accuracy: TaskAccuracy | None, allowed: Tolerance) -> list[str]:
    if accuracy is None or accuracy.high >= -allowed.accuracy:
        return []
    return [
        f"accuracy: {accuracy.candidate:.1%} instead of {accuracy.reference:.1%} on {accuracy.examples} examples, "
        f"a loss of {-accuracy.high:.1%} to {-accuracy.low:.1%} with 95 % confidence, allowed {allowed.accuracy:.1%}"
    ]


def first_wrong_layer(layers: Sequence[LayerParity], allowed: Tolerance) -> str | None:
    """The lowest layer whose gates or choices differ by more than rounding; None where all routers agree.

    A router sees what the layers below it made, so the fault lies in this router, or between it and the router below.
    """
    for layer in layers:
        if layer.faults or layer.moved or layer.gate_error is None or layer.gate_error > allowed.margin:
            return layer.name
    return None
