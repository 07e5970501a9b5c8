"""A variant of a model whose routing is an input: for parity without flips, and for looking at single experts.

forced.onnx has two more inputs for each layer whose routing the graph has as values::

    <layer>/forced/ids (T, K) int64         which experts, 0 to E - 1
    <layer>/forced/weights (T, K) float32   what their outputs are multiplied by

With every token sent to expert e with weight 1 (and weight 0 for the other slots), a layer gives the output of that
expert alone, and so its norm, whatever the router thinks of it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter, Names
from graph_passes.graph.order import sort_nodes
from graph_passes.graph.walk import producer, replace_reads
from graph_passes.model_file import load_graph, save_variant
from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock, Router, Slots
from graph_passes.writers.routing import Routing, gates_of
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL

FORCED = "forced.onnx"


def save_forced(directory: Path) -> dict[str, list[str]]:
    """Write ``directory/forced.onnx`` beside model.onnx, whose weights it shares; for each layer its two new inputs.

    Raises:
        UserError: an op of a layer routes by itself.
    """
    graph = load_graph(directory / MODEL)
    names = Names(graph)
    inputs = {
        block.name: force_routing(graph, Emitter(graph, block.name, names), block)
        for block in read_blocks(graph, directory).blocks
    }
    sort_nodes(graph)
    save_variant(graph, directory / FORCED)
    return inputs


def force_routing(graph: gs.Graph, emitter: Emitter, block: MoEBlock) -> list[str]:
    """Let the experts of ``block`` read ids and weights that are inputs of ``graph``; the names of the two.

    Raises:
        UserError: its op routes by itself, or its ids are not those of its experts.
    """
    emitter, router = emitter.within("forced"), block.router
    if router.leads_to is not None:
        raise UserError(
            f"the routing of layer {block.name} cannot be forced: some rows of its router lead to no expert of their "
            "own",
            hint="leave --forced out",
        )
    tokens = emitter.fresh("tokens")
    ids, weights = (
        gs.Variable(emitter.fresh(label), dtype, [tokens, router.top_k])
        for label, dtype in (("ids", np.int64), ("weights", np.float32))
    )
    if router.gates is not None:
        gates = gates_of(emitter, Routing(router.ranked, ids_TK=ids, weights_TK=weights), block)
        read_instead(emitter, router.gates, gates, "gates")
    elif router.slots is not None:
        read_instead(emitter, router.slots.ids, ids, "ids", except_by=_weighing(router, router.slots))
        read_instead(emitter, router.slots.weights, weights, "weights")
    else:
        raise UserError(
            f"the routing of layer {block.name} cannot be forced: an op of form {block.form} routes by itself",
            hint="write the layer in another form: --form sorted, dense or gather",
        )
    graph.inputs.extend([ids, weights])
    return [str(ids.name), str(weights.name)]


def _weighing(router: Router, slots: Slots) -> list[gs.Node]:
    """The readers of the ids that the weights come from: the router's own choice stays what it is."""
    leading: dict[int, gs.Node] = {}
    front = [producer(slots.weights)]
    while front:
        node = front.pop()
        if node is not None and id(node) not in leading:
            leading[id(node)] = node
            ends = (slots.ids, router.hidden)
            front.extend(producer(tensor) for tensor in node.inputs if all(tensor is not end for end in ends))
    return [node for node in slots.ids.outputs if id(node) in leading]


def read_instead(
    emitter: Emitter, old: gs.Tensor, given: gs.Tensor, label: str, except_by: Sequence[gs.Node] = ()
) -> None:
    """Let whoever reads ``old``, but for ``except_by``, read ``given``, in its shape and dtype."""
    shape = emitter.emit("Shape", old, label=f"{label}_shape")
    shaped = emitter.emit("Reshape", given, shape, label=f"{label}_shaped")
    typed = emitter.emit("CastLike", shaped, old, label=f"{label}_typed")
    replace_reads(old, typed, except_by=[shape.inputs[0], typed.inputs[0], *except_by])
