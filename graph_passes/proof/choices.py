"""Whether the routers of a result choose the experts that those of its reference choose, token by token.

Two experts whose scores differ by less than rounding may change places: such tokens are counted, and fail nothing. What
a token chooses is where its gate is not 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_spec.errors import VerificationError
from moe_spec.manifest import BlockEntry
from moe_spec.runner import Arrays, Feeds, Runner

Matrix = npt.NDArray[np.floating]


@dataclasses.dataclass(frozen=True)
class Watched:
    """One layer whose router is left, in reference and result.

    Attributes:
        reference: the layer there; ``gates`` and ``scores`` are outputs.
        result: likewise.
        keep: for each expert of the result its id in the reference.
        by_score: whether the scores alone decide, expert by expert: not where groups or a capacity do too.
    """

    reference: BlockEntry
    result: BlockEntry
    keep: tuple[int, ...]
    by_score: bool


@dataclasses.dataclass(frozen=True)
class ChoiceEntry:
    """One layer at one shape.

    Attributes:
        layer: its path.
        tokens: how many there were.
        agreeing: for how many of them the same experts were chosen.
        margin: by how much the reference preferred its own choice where the two differ, relative to its largest score
            of an expert that any token chooses; the largest of these. None where no token differs, or more than scores
            decides.
    """

    layer: str
    tokens: int
    agreeing: int
    margin: float | None


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the layers chose.

    Attributes:
        entries: of each layer at each shape.
        not_exercised: ids of the experts that no token chose in the reference, by layer: what those compute was
            compared with nothing. Only layers that have such, and became others than they were.
    """

    entries: tuple[ChoiceEntry, ...] = ()
    not_exercised: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def compare_choices(
    watched: Sequence[Watched], batches: Sequence[Feeds], reference: Path, result: Path, runner: Runner
) -> Choices:
    """Run two files whose routers are observed, and compare what they choose."""
    if not watched:
        return Choices()
    expected = runner.run(reference, batches, _outputs([each.reference for each in watched]))
    got = runner.run(result, batches, _outputs([each.result for each in watched]))
    both = list(zip(expected, got, strict=True))
    entries = tuple(compare_choice(each, wanted, found) for wanted, found in both for each in watched)
    idle = {each.result.name: _idle(each, expected) for each in watched if _is_another(each)}
    return Choices(entries, {name: experts for name, experts in idle.items() if experts})


def _is_another(watched: Watched) -> bool:
    before, after = watched.reference, watched.result
    return (before.form, before.experts, before.bytes) != (after.form, after.experts, after.bytes)


def _idle(watched: Watched, expected: Sequence[Arrays]) -> tuple[int, ...]:
    """Ids of the experts that the reference chose in none of its runs."""
    assert watched.reference.gates is not None
    chosen = [(arrays[watched.reference.gates] != 0).any(axis=0) for arrays in expected]
    used = np.any(chosen, axis=0)
    return tuple(name for name, own in zip(watched.result.keep, watched.keep, strict=True) if not used[own])


def check_choices(entries: Sequence[ChoiceEntry], tolerance: float) -> None:
    """Refuse other choices.

    Raises:
        VerificationError: the reference prefers its own by more than ``tolerance``.
    """
    for entry in entries:
        if entry.margin is not None and entry.margin > tolerance:
            raise VerificationError(
                f"the router of layer {entry.layer} chooses other experts for {entry.tokens - entry.agreeing} of "
                f"{entry.tokens} tokens than the original with the dropped experts unselectable, which prefers its own "
                f"by {entry.margin:.2e} of its scores' range (allowed {tolerance:.0e}); nothing was written"
            )


def _outputs(entries: Sequence[BlockEntry]) -> list[str]:
    return [name for entry in entries for name in (entry.gates, entry.scores) if name is not None]


def compare_choice(watched: Watched, expected: Arrays, got: Arrays) -> ChoiceEntry:
    """What one layer chose, in outputs of reference and result."""
    assert watched.reference.gates is not None
    assert watched.reference.scores is not None
    assert watched.result.gates is not None
    wanted = expected[watched.reference.gates] != 0
    scores = expected[watched.reference.scores][:, : wanted.shape[1]]
    found = np.zeros_like(wanted)
    found[:, list(watched.keep)] = got[watched.result.gates] != 0
    other = (wanted != found).any(axis=1)
    margins = _margins(wanted[other], found[other], scores[other]) if watched.by_score else np.zeros(0)
    chosen = np.abs(scores[:, (wanted | found).any(axis=0)])  # a mask of the model's own may be -1e9 and finite
    largest = chosen.max(initial=0.0, where=np.isfinite(chosen))
    margin = float(margins.max() / max(largest, 1e-30)) if len(margins) else None
    return ChoiceEntry(watched.result.name, len(wanted), int((~other).sum()), margin)


def _margins(wanted: npt.NDArray[np.bool_], found: npt.NDArray[np.bool_], scores: Matrix) -> Matrix:
    """By how much the best expert that was given up scores above the worst that was taken, for each such token.

    >>> wanted, found = np.array([[True, False, False]]), np.array([[False, False, True]])
    >>> _margins(wanted, found, np.array([[3.0, 2.0, 1.0]]))
    array([2.])
    """
    given_up, taken = wanted & ~found, found & ~wanted
    swapped = given_up.any(axis=1) & taken.any(axis=1)  # else a weight vanished, which the outputs tell
    best = np.where(given_up, scores, -np.inf).max(axis=1, initial=-np.inf)
    worst = np.where(taken, scores, np.inf).min(axis=1, initial=np.inf)
    margins: Matrix = (best - worst)[swapped]
    return margins
