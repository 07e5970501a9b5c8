"""The proof of casts: a rounded model cannot give what the model gave, so it is looked at in two steps.

First nothing but rounding may have happened: the result with float32 in the place of its halves must give, as strictly
as ever, what the float32 graph gives whose weights were rounded. Then the result itself is run, and must be as near to
that as its format is exact. How far it is from the float32 model, every value rounded, is a number and no verdict.

Rounding flips a choice of experts where two score almost the same, and all that follows is another computation. So
elements are compared in batches in which no router chose otherwise, and a flip has to be one that rounding explains.
bfloat16 is not run, and of float16 the run shows above all that every type fits: see `graph_passes.casts.emulate`.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.casts.assign import Format, Formats
from graph_passes.casts.emulate import Largest, run_emulated
from graph_passes.graph.walk import constants
from graph_passes.model_file import load_graph, save_graph
from graph_passes.proof.choices import ChoiceEntry, Watched, compare_choice
from graph_passes.proof.compare import OracleEntry, check
from graph_passes.proof.feeds import batches_for, random_feeds
from graph_passes.proof.retype import WIDENED, declared, save_retyped
from graph_passes.proof.runnable import check_runnable
from graph_passes.readers import read_blocks
from graph_passes.weights.stored import LazyWeight, of_constant
from moe_spec.errors import VerificationError
from moe_spec.manifest import MODEL, OBSERVED
from moe_spec.runner import Arrays, Feeds, Runner, error_between

HALF = np.dtype(np.float16)

ELEMENT = 5e-3
"""Largest difference that float16 may make, relative to an output's largest magnitude: as `verify` has it."""

ELEMENT_OF_CODES = 4e-2
"""The same where activations are int8 too: rounding moves a number to the next code, likewise."""

MARGIN = 2e-2
"""By how much a router may prefer a choice that it does not make any more, likewise."""

SINGLES = 8
"""Further batches of a single token, where a router chose otherwise in all of the others."""

ROUNDED = "the graph with casts, computed in float32, differs from the float32 graph with rounded weights"

NOT_JUDGED = "a comparison of outputs in float16: for all random inputs a router chose otherwise than in float32"


@dataclasses.dataclass(frozen=True)
class CastProof:
    """What was compared.

    Attributes:
        rewrite: the result in float32 beside the rounded weights in the graph that was cast.
        low: the result as it is beside the same in float32, in batches without flips; nothing where it was not run,
            as bfloat16 is not, or where every batch had a flip.
        choices: of the routers there.
        largest: what comes nearest to the end of float16, where that is there.
        error: largest difference that rounding every value makes to the float32 model, relative to an output's largest
            magnitude.
    """

    rewrite: list[OracleEntry]
    low: list[OracleEntry]
    choices: list[ChoiceEntry]
    largest: Largest | None
    error: float


def prove_casts(
    wide: Path, narrow: Path, watched: Sequence[Watched], formats: Formats, runner: Runner, scratch: Path
) -> CastProof:
    """Compare the result in directory ``narrow`` with the float32 model in ``wide``.

    Args:
        wide: holds model.onnx.
        narrow: holds model.onnx and observed.onnx, cast.
        watched: the MoE layers of ``narrow`` whose routers are observed.
        formats: that were asked for.
        runner: runs them.
        scratch: a directory that holds the weights twice in float32 meanwhile.

    Raises:
        UserError: the runner does not run an op.
        VerificationError: more differs than rounding explains, or float16 overflows.
    """
    graph, result = load_graph(wide / MODEL), load_graph(narrow / MODEL)
    check_runnable(result.nodes, "the result in low precision")
    taken = {tensor.name: declared(tensor) for tensor in result.inputs}
    batches = [
        _rounded(feeds, taken) for feeds in batches_for(wide / MODEL, graph, read_blocks(graph, wide).blocks, runner)
    ]
    with tempfile.TemporaryDirectory(prefix=".casts.", dir=scratch) as directory:
        rounded, widened = (Path(directory) / name for name in ("rounded", "widened"))
        _save_rounded(result, wide, rounded)
        widened.mkdir()
        save_retyped(narrow / MODEL, widened / MODEL, WIDENED)
        rewrite = check(batches, rounded, widened, runner, ROUNDED)
        emulated = run_emulated(widened, result, batches, runner)
        error = _largest_error(runner.run(wide / MODEL, batches), emulated.outputs)
        if formats.has_bfloat16:
            return CastProof(rewrite, [], [], emulated.largest, error)
        save_retyped(narrow / OBSERVED, widened / OBSERVED, WIDENED)
        codes = any(node.op == "QuantizeLinear" for node in result.nodes)
        sides = _Sides(narrow, widened, taken, watched, runner, ELEMENT_OF_CODES if codes else ELEMENT)
        low, choices = sides.compare([*batches, *_singles(graph, taken)], len(batches))
        return CastProof(rewrite, low, choices, emulated.largest, error)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """The result in low precision, and the same in float32."""

    narrow: Path
    widened: Path
    taken: Mapping[str, Format | None]
    watched: Sequence[Watched]
    runner: Runner
    allowed: float

    def compare(self, batches: Sequence[Feeds], enough: int) -> tuple[list[OracleEntry], list[ChoiceEntry]]:
        """Run both until the first ``enough`` batches are judged, and one in which no router chose otherwise."""
        low: list[OracleEntry] = []
        choices: list[ChoiceEntry] = []
        with self.runner.open(self.widened / OBSERVED) as reference, self.runner.open(self.narrow / OBSERVED) as result:
            for index, feeds in enumerate(batches):
                if index >= enough and low:
                    break
                expected, got = reference.run(feeds), result.run(self._given(feeds))
                found = [compare_choice(each, expected, got) for each in self.watched]
                choices += found
                flipped = next((entry for entry in found if entry.agreeing < entry.tokens), None)
                if flipped is None:
                    low += self._elements(feeds, expected, got)
                else:  # what comes behind the first flip sees other hidden states
                    _check_margin(flipped)
        return low, choices

    def _given(self, feeds: Feeds) -> Arrays:
        return {name: array.astype(self.taken[name], copy=False) for name, array in feeds.items()}

    def _elements(self, feeds: Feeds, expected: Arrays, got: Arrays) -> list[OracleEntry]:
        observed = {name for each in self.watched for name in (each.result.gates, each.result.scores)}
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        entries = [
            OracleEntry(shapes, name, HALF.name, *error_between(value, got[name]))
            for name, value in expected.items()
            if name not in observed
        ]
        worst = max(entries, key=lambda entry: entry.max_rel)
        if worst.max_rel > self.allowed:
            raise VerificationError(
                f"output {worst.output!r} in float16 differs from the same graph in float32 by {worst.max_rel:.2e} of "
                f"its range (allowed {self.allowed:.0e}), and no router chose otherwise; nothing was written"
            )
        return entries


def _check_margin(entry: ChoiceEntry) -> None:
    if entry.margin is not None and entry.margin > MARGIN:
        raise VerificationError(
            f"the router of layer {entry.layer} chooses other experts for {entry.tokens - entry.agreeing} of "
            f"{entry.tokens} tokens in float16 than in float32, which prefers its own by {entry.margin:.2e} of its "
            f"scores' range (allowed {MARGIN:.0e}); nothing was written"
        )


def _rounded(feeds: Feeds, taken: Mapping[str, Format | None]) -> Arrays:
    """``feeds`` in float32, with the values that inputs of halves can have."""
    return {
        name: array.astype(taken[name]).astype(array.dtype) if taken[name] in WIDENED else array
        for name, array in feeds.items()
    }


def _singles(graph: gs.Graph, taken: Mapping[str, Format | None]) -> list[Arrays]:
    rng = np.random.default_rng(1)
    return [_rounded(random_feeds(graph, (1, 1, 0), rng), taken) for _ in range(SINGLES)]


def _save_rounded(result: gs.Graph, source: Path, target: Path) -> None:
    """Write the model in ``source`` with those weights rounded that ``result`` has rounded, in the format they had."""
    target.mkdir()
    graph = load_graph(source / MODEL)
    to = {tensor.name: declared(tensor) for tensor in constants(result)}
    for tensor in constants(graph):
        format_ = to.get(tensor.name)
        if format_ is not None and format_ in WIDENED:
            weight = of_constant(tensor, source)
            tensor._values = LazyWeight(weight.astype(format_).astype(weight.dtype))
    save_graph(graph, source, target / MODEL)


def _largest_error(expected: Sequence[Arrays], got: Sequence[Arrays]) -> float:
    both = zip(expected, got, strict=True)
    return max(error_between(wanted[name], found[name])[1] for wanted, found in both for name in wanted)
