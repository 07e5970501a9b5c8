"""The proof that a result computes what the original computes, with the dropped experts unselectable.

Where experts are quantised on the way, the result cannot be as near. Then three things are looked at: the same experts
in float, in form ``sorted``, against the original; that form with every weight rounded as the quantised ones are,
against the result, as strictly; and how far the result is from the original, which is a number and no verdict.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from graph_passes.describe import Model
from graph_passes.emitter import Names
from graph_passes.mask import save_masked
from graph_passes.model_file import link_weights, load_graph, save_graph, save_variant
from graph_passes.oracle import OracleEntry, check, compare
from graph_passes.order import tidy
from graph_passes.prune import match_layers, prune_block
from graph_passes.quantize import Quantization, rounded
from graph_passes.readers import read_blocks
from graph_passes.rewrite import Decision, carry_out
from graph_passes.runnable import check_runnable
from moe_spec.manifest import MODEL
from moe_spec.plan import LayerPlan, PruningPlan
from moe_spec.runner import Runner

TWIN = "sorted"
"""The form in which experts that are to be quantised are proven in float: it expresses every block."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        oracle: the error of each output at each shape.
        quantization_error: largest difference between the result and the original relative to an output's largest
            magnitude; None where nothing was quantised.
    """

    oracle: tuple[OracleEntry, ...] = ()
    quantization_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """What was done to a model.

    Attributes:
        model: as it was read; its graph is that of the result by now.
        plan: the plan that was given.
        layers: for each block what it loses, planned or unreachable.
        how: how experts were quantised, if they were.
    """

    model: Model
    plan: PruningPlan | None
    layers: Sequence[LayerPlan | None]
    how: Quantization | None


def prove(work: Work, candidate: Path, runner: Runner, scratch: Path) -> Proof:
    """Compare the result in directory ``candidate`` with the original; ``scratch`` takes files on the way.

    Raises:
        UserError: the runner does not run an op of one of them.
        VerificationError: an output differs.
    """
    original = work.model.path
    check_runnable(work.model.graph.nodes, f"the result of {original}")
    check_runnable(load_graph(original).nodes, str(original))
    with tempfile.TemporaryDirectory(prefix=".reference.", dir=scratch) as directory:
        reference = _reference(work, runner, Path(directory) / "masked")
        graph = load_graph(original)
        if work.how is None:
            return Proof(tuple(check(graph, reference, candidate, runner)))
        twin, coarse = (Path(directory) / name for name in ("float", "rounded"))
        _save_twin(work, None, twin)
        check(graph, reference, twin, runner)
        _save_twin(work, work.how, coarse)
        oracle = check(graph, coarse, candidate, runner)
        error = max(entry.max_rel for entry in compare(graph, reference, candidate, runner))
        return Proof(tuple(oracle), error)


def _reference(work: Work, runner: Runner, target: Path) -> Path:
    """The original with the dropped experts unselectable; as it is where nothing was planned: unreachable ones are."""
    original = work.model.path
    if work.plan is None:
        return original
    target.mkdir()
    graph = load_graph(original)  # anew: the one that was read before has become the candidate
    blocks = read_blocks(graph, original.parent).blocks
    if work.model.reduced:  # the masked graph starts from what is left, so that is proven first
        link_weights(graph, original.parent, target)
        save_variant(graph, target / MODEL)
        check(graph, original, target, runner)
    save_masked(graph, Names(graph), blocks, match_layers(work.plan, blocks), original.parent, target)
    return target


def _save_twin(work: Work, rounding: Quantization | None, target: Path) -> None:
    """The result in float, every layer in form `TWIN`, its weights rounded where ``rounding`` says how."""
    target.mkdir()
    directory = work.model.path.parent
    graph = load_graph(work.model.path)
    decisions = []
    for block, layer in zip(read_blocks(graph, directory).blocks, work.layers, strict=True):
        pruned = block if layer is None else prune_block(block, layer)
        if rounding is not None:
            pruned = dataclasses.replace(pruned, experts=rounded(pruned.experts, rounding))
        decisions.append(Decision(block, pruned, TWIN))
    carry_out(graph, decisions)
    tidy(graph)
    save_graph(graph, directory, target / MODEL)
