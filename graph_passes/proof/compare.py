"""Proof that a pruned graph computes what the original computes with the dropped experts unselectable."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from graph_passes.model_file import model_path
from graph_passes.proof.rounding import ROUNDING, own_rounding
from moe_spec.errors import VerificationError
from moe_spec.runner import Arrays, Feeds, Runner, error_between

HALVES: Mapping[int, str] = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}

TOLERANCE: Mapping[str, float] = {"float64": 1e-5, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest difference allowed, relative to the largest magnitude of the output, by the output's dtype."""

BETWEEN = "the optimised graph differs from the original with the dropped experts unselectable"


@dataclasses.dataclass(frozen=True)
class OracleEntry:
    """The error of one output at one shape.

    Attributes:
        shapes: of the inputs.
        output: its name.
        dtype: its dtype.
        max_abs: the largest difference.
        max_rel: that over the largest magnitude of the output.
        rounding: where that is beyond `TOLERANCE`: how far the reference is from itself in float64.
    """

    shapes: Mapping[str, Sequence[int]]
    output: str
    dtype: str
    max_abs: float
    max_rel: float
    rounding: float | None = None


def check(
    batches: Sequence[Feeds], reference: Path, candidate: Path, runner: Runner, between: str = BETWEEN
) -> list[OracleEntry]:
    """`compare`, and refuse a difference; ``between`` says what differs from what.

    Raises:
        VerificationError: an output differs by more than `TOLERANCE`, and by more than rounding explains.
    """
    expected, got = (runner.run(model_path(path), batches) for path in (reference, candidate))
    entries = _entries(batches, expected, got)
    if all(entry.max_rel <= TOLERANCE.get(entry.dtype, 0.0) for entry in entries):
        return entries
    halves = _halves(model_path(reference))
    beyond = [entry for entry in entries if entry.max_rel > max(map(tolerance_of, (entry.dtype, *halves)))]
    if not beyond:
        return entries
    singles = not halves and all(entry.dtype == "float32" for entry in beyond)
    rounding = None
    if singles:
        rounding = own_rounding(model_path(reference), batches, expected, got, runner, candidate.parent)
    if rounding is None:
        entry = beyond[0]
        raise VerificationError(
            f"output {entry.output!r} of {between} by {entry.max_rel:.2e} of its range "
            f"(allowed {tolerance_of(entry.dtype):.0e} for {entry.dtype}); nothing was written"
        )
    return [dataclasses.replace(entry, rounding=rounding) if entry in beyond else entry for entry in entries]


def tolerance_of(dtype: str) -> float:
    """What is allowed for outputs of ``dtype``; nothing where they are no floats."""
    return TOLERANCE.get(dtype, 0.0)


def tolerance_of_scores(reference: Path, entries: Sequence[OracleEntry]) -> float:
    """What is allowed for the scores of routers where `check` allowed ``entries``: they are no more exact than outputs.

    Nor than the halves that ``reference`` holds.
    """
    formats = {*_halves(model_path(reference)), *(entry.dtype for entry in entries)}
    return max([*map(tolerance_of, formats), *(ROUNDING * (entry.rounding or 0.0) for entry in entries)])


def _halves(model: Path) -> set[str]:
    """The halves that ``model`` holds: logits that are cast to float32 at its end are not as exact as that."""
    held = onnx.load(model, load_external_data=False).graph.initializer
    return {HALVES[tensor.data_type] for tensor in held if tensor.data_type in HALVES}


def compare(batches: Sequence[Feeds], reference: Path, candidate: Path, runner: Runner) -> list[OracleEntry]:
    """Run both on the same inputs."""
    return _entries(batches, *(runner.run(model_path(path), batches) for path in (reference, candidate)))


def _entries(batches: Sequence[Feeds], expected: Sequence[Arrays], got: Sequence[Arrays]) -> list[OracleEntry]:
    entries = []
    for feeds, wanted, found in zip(batches, expected, got, strict=True):
        shapes = {key: list(feed.shape) for key, feed in feeds.items()}
        for name, value in wanted.items():
            entries.append(OracleEntry(shapes, name, value.dtype.name, *error_between(value, found[name])))
    return entries
