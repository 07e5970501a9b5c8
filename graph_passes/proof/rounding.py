"""Rounding told from faults: both sides of a proof are compared with the reference in float64.

A deep trained model magnifies rounding, at some tokens a hundred times more than at others, beyond any fixed tolerance.
Of 30 layers of SmolLM2 with experts, original and optimised graph are 1e-6 to 8e-6 of an output's range from float64,
and at one of 21 random tokens 3e-6 and 1.2e-5: the one that moves most, in float64 too, when weights lose half a bit.
What rounding can do there a single run does not tell, so the original is also run with other last bits.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from graph_passes.graph.walk import constants
from graph_passes.model_file import load_graph, save_graph
from graph_passes.proof.retype import DOUBLED, retyped, save_retyped
from graph_passes.weights.stored import LazyWeight, of_constant
from graph_passes.weights.weight import Array
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL
from moe_spec.runner import Arrays, Feeds, Runner, error_between

ROUNDING = 4.0
"""How many times further than the reference a result may be from the reference in float64."""

DRAWS = 3
"""How often the reference is run with other last bits, at most."""

SHARE = 64
"""One weight in so many has another last bit in such a run."""

LARGEST = 1e-4
"""What the reference's own rounding may be: where it leaves fewer digits, four times that would hide faults."""

_HUGE = np.float32(1e30)


def own_rounding(
    reference: Path,
    batches: Sequence[Feeds],
    expected: Sequence[Arrays],
    got: Sequence[Arrays],
    runner: Runner,
    scratch: Path,
) -> float | None:
    """How far ``reference`` is from itself in float64, where another graph is at most `ROUNDING` times as far.

    It is relative to the range of an output, and the largest of all outputs and batches.

    Args:
        reference: an ONNX file.
        batches: what both graphs took.
        expected: what ``reference`` gave, in float32.
        got: what the other gave.
        runner: runs variants of ``reference``.
        scratch: a directory that holds twice the weights meanwhile.

    Returns:
        None where the other is further away, where that is more than `LARGEST`, or without kernels for float64.
    """

    def run(save: Callable[[Path, Path], None], feeds: Sequence[Feeds]) -> list[Arrays]:
        with tempfile.TemporaryDirectory(prefix=".rounding.", dir=scratch) as directory:
            save(reference, Path(directory) / MODEL)
            return runner.run(Path(directory) / MODEL, feeds)

    try:
        doubled = [retyped(feeds, DOUBLED) for feeds in batches]
        exact = run(lambda source, target: save_retyped(source, target, DOUBLED), doubled)
    except UserError:
        return None
    own, other, random = _error(exact, expected), _error(exact, got), np.random.default_rng(0)
    for _ in range(DRAWS):
        if other > ROUNDING * own:
            own = max(own, _error(exact, run(lambda source, target: save_drawn(source, target, random), batches)))
    return own if own <= LARGEST and other <= ROUNDING * own else None


def save_drawn(source: Path, target: Path, random: np.random.Generator) -> None:
    """Write the ONNX file ``source``, one in `SHARE` of its float32 weights further from 0 by their last bit.

    Few, so that it is rounding that differs afterwards and not the model. Single numbers stay, an exponent of 2 is no
    weight; so do masks of infinite and next to infinite numbers.
    """

    def change(values: Array) -> Array:
        drawn = (random.integers(0, SHARE, values.shape, dtype=np.uint8) == 0) & (np.abs(values) < _HUGE)
        return np.where(drawn, np.nextafter(values, np.copysign(_HUGE, values)), values)

    graph = load_graph(source)
    for tensor in constants(graph):
        weight = of_constant(tensor, source.parent)
        if weight.dtype == np.float32 and math.prod(weight.shape) > 1:
            tensor._values = LazyWeight(weight.map(weight.shape, change, row_wise=True))
    save_graph(graph, source.parent, target)


def _error(exact: Sequence[Arrays], results: Sequence[Arrays]) -> float:
    both = zip(exact, results, strict=True)
    return max(error_between(wanted[name], found[name])[1] for wanted, found in both for name in wanted)
