"""The proof that a result computes what the original computes, with the dropped experts unselectable.

Where experts are quantised on the way, the result cannot be as near. Then three things are looked at: the same experts
in float, in form ``sorted``, against the original; that form with every weight rounded as the quantised ones are,
against the result, as strictly; and how far the result is from the original, which is a number and no verdict.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_graphsurgeon as gs

from graph_passes.describe import Model
from graph_passes.graph.emitter import Names
from graph_passes.model_file import link_weights, load_graph, save_variant
from graph_passes.proof.choices import Choices, Watched, check_choices, compare_choices
from graph_passes.proof.compare import OracleEntry, check, compare, tolerance_of_scores
from graph_passes.proof.feeds import batches_for
from graph_passes.proof.mask import save_masked, save_observed
from graph_passes.proof.runnable import check_runnable
from graph_passes.proof.twin import aligned, merged, save_twin
from graph_passes.quantization.quantize import Quantization, is_quantized, rounded
from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock
from graph_passes.record.merge import merges
from graph_passes.record.prune import match_layers, prune_block
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL, OBSERVED, BlockEntry
from moe_spec.plan import PruningPlan
from moe_spec.runner import Feeds, Runner


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        oracle: the error of each output at each shape.
        choices: of the routers, in each layer whose router is left.
        precision_error: largest difference between the result and the original relative to an output's largest
            magnitude; None where nothing was quantised.
    """

    oracle: tuple[OracleEntry, ...] = ()
    choices: Choices = dataclasses.field(default_factory=Choices)
    precision_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """What was done to a model.

    Attributes:
        model: as it was read; its graph is that of the result by now.
        plan: the plan that was given.
        layers: for each block what it loses, planned or unreachable.
        entries: for each block what became of it; nothing where the file is what it was.
        how: how experts were quantised, if they were.
        rest: how the rest was, likewise.
    """

    model: Model
    plan: PruningPlan | None
    layers: Sequence[LayerPlan | None]
    entries: Sequence[BlockEntry]
    how: Quantization | None
    rest: Quantization | None = None


def prove(work: Work, candidate: Path, runner: Runner, scratch: Path) -> Proof:
    """Compare the result in directory ``candidate`` with the original; ``scratch`` takes files on the way.

    Raises:
        UserError: the runner does not run an op of one of them.
        VerificationError: an output differs.
    """
    original = work.model.path
    check_runnable(work.model.graph.nodes, f"the result of {original}")
    graph = load_graph(original)  # anew: the one that was read before has become the candidate
    check_runnable(graph.nodes, str(original))
    batches = batches_for(original, graph, work.model.blocks, runner)
    with tempfile.TemporaryDirectory(prefix=".reference.", dir=scratch) as directory:
        reference = _reference(work, graph, batches, runner, Path(directory) / "masked")
        files = (reference.directory / OBSERVED, candidate / OBSERVED)
        if work.how is None and work.rest is None:
            oracle = check(batches, reference.path, candidate, runner)
            choices = compare_choices(reference.watched, batches, *files, runner)
            check_choices(choices.entries, tolerance_of_scores(reference.path, oracle))
            return Proof(tuple(oracle), choices)
        twin, coarse = (Path(directory) / name for name in ("float", "rounded"))
        _save_twin(work, None, None, twin)
        check(batches, reference.path, twin, runner)
        _save_twin(work, work.how, work.rest, coarse)
        oracle = check(batches, coarse, candidate, runner)
        error = max(entry.max_rel for entry in compare(batches, reference.path, candidate, runner))
        choices = compare_choices(reference.watched, batches, *files, runner)
        return Proof(tuple(oracle), choices, error)


def prove_variant(directory: Path, variant: str, runner: Runner) -> None:
    """Compare file ``variant`` in ``directory`` with model.onnx beside it, in all that both give.

    Raises:
        VerificationError: an output differs.
    """
    graph = load_graph(directory / MODEL)
    batches = batches_for(directory / MODEL, graph, read_blocks(graph, directory).blocks, runner)
    between = f"{variant} differs from that of {MODEL}"
    check(batches, directory / MODEL, directory / variant, runner, between)


@dataclasses.dataclass(frozen=True)
class _Reference:
    """The original with the dropped experts unselectable.

    Attributes:
        path: the original itself where nothing was planned: unreachable experts are unselectable as it is.
        directory: holds observed.onnx.
        watched: the layers whose choices are compared.
    """

    path: Path
    directory: Path
    watched: tuple[Watched, ...]


def _reference(work: Work, graph: gs.Graph, batches: Sequence[Feeds], runner: Runner, target: Path) -> _Reference:
    """Write the reference; ``graph`` is the original's, and is masked."""
    original = work.model.path
    if any(map(merges, work.model.blocks, work.layers)):
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            ordered = save_twin(original, work.layers, aligned, Path(directory) / "aligned")
            check(batches, original, ordered, runner, "the original with its neurons in order differs from what it was")
        original = save_twin(original, work.layers, merged, target.with_name("merged"))
        graph = load_graph(original)
    target.mkdir()
    read = zip(read_blocks(graph, original.parent).blocks, work.model.blocks, strict=True)
    blocks: Sequence[MoEBlock] = [dataclasses.replace(block, name=known.name) for block, known in read]
    names, layers = Names(graph), match_layers(work.plan, blocks)
    if work.plan is not None and work.model.reduced:  # the masked graph starts from what is left: proven first
        link_weights(graph, original.parent, target)
        save_variant(graph, target / MODEL)
        check(batches, original, target, runner)
    if work.plan is None:
        link_weights(graph, original.parent, target)
    else:
        blocks = save_masked(graph, names, blocks, layers, original.parent, target)
    observed = save_observed(graph, names, blocks, layers, target) if work.entries else ()
    watched = [
        _watch(block, entry, after, layer)
        for block, entry, after, layer in zip(blocks, observed, work.entries, work.layers, strict=False)
        if entry.gates is not None and after.gates is not None
    ]
    return _Reference(original if work.plan is None else target, target, tuple(watched))


def _watch(block: MoEBlock, before: BlockEntry, after: BlockEntry, layer: LayerPlan | None) -> Watched:
    keep = tuple(range(block.num_experts)) if layer is None else layer.keep
    return Watched(before, after, keep, by_score=block.router.groups is None and block.router.capacity is None)


def _save_twin(work: Work, rounding: Quantization | None, rest: Quantization | None, target: Path) -> None:
    """The result in float, what was changed in form `TWIN`; weights rounded where ``rounding`` and ``rest`` say how.

    Layers that are neither pruned nor quantised stay as they stand: not every opset takes that form, and ranges of int8
    activations would be lost in it.
    """

    def change(block: MoEBlock, layer: LayerPlan | None) -> MoEBlock | None:
        pruned = block if layer is None else prune_block(block, layer)
        quantizes = work.how is not None and not is_quantized(pruned.experts, work.how)
        if pruned.num_experts == block.num_experts and not quantizes:
            return None
        if rounding is None or not quantizes:
            return pruned
        return dataclasses.replace(pruned, experts=rounded(pruned.experts, rounding))

    save_twin(work.model.path, work.layers, change, target, rest)
