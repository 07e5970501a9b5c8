"""Proof that a pruned graph computes what the original computes with the dropped experts unselectable."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_spec.errors import VerificationError
from moe_spec.manifest import MODEL
from moe_spec.runner import Feeds, Runner, error_between

TOLERANCE: Mapping[str, float] = {"float64": 1e-5, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest difference allowed, relative to the largest magnitude of the output, by the output's dtype."""

BETWEEN = "the optimised graph differs from the original with the dropped experts unselectable"


@dataclasses.dataclass(frozen=True)
class OracleEntry:
    """The error of one output at one shape."""

    shapes: Mapping[str, Sequence[int]]
    output: str
    dtype: str
    max_abs: float
    max_rel: float


def check(
    batches: Sequence[Feeds], reference: Path, candidate: Path, runner: Runner, between: str = BETWEEN
) -> list[OracleEntry]:
    """`compare`, and refuse a difference; ``between`` says what differs from what.

    Raises:
        VerificationError: an output differs by more than `TOLERANCE`.
    """
    entries = compare(batches, reference, candidate, runner)
    for entry in entries:
        allowed = TOLERANCE.get(entry.dtype, 0.0)
        if entry.max_rel > allowed:
            raise VerificationError(
                f"output {entry.output!r} of {between} by {entry.max_rel:.2e} of its range "
                f"(allowed {allowed:.0e} for {entry.dtype}); nothing was written"
            )
    return entries


def compare(batches: Sequence[Feeds], reference: Path, candidate: Path, runner: Runner) -> list[OracleEntry]:
    """Run both on the same inputs."""
    expected, got = (runner.run(path / MODEL if path.is_dir() else path, batches) for path in (reference, candidate))
    entries = []
    for feeds, wanted, found in zip(batches, expected, got, strict=True):
        shapes = {key: list(feed.shape) for key, feed in feeds.items()}
        for name, value in wanted.items():
            entries.append(OracleEntry(shapes, name, value.dtype.name, *error_between(value, found[name])))
    return entries
