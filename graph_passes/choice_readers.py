"""Who else reads what a router chose: ids and weights of a pruned layer mean something else than before.

Logits that are an output of the graph stay what they were, with a column for every expert of the original. But a
choice among fewer experts is another choice, and nobody but the experts may see the old one.
"""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import producer, source
from graph_passes.record.block import MoEBlock
from moe_spec.errors import UserError


def check_choice_is_unread(graph: gs.Graph, pruned: Sequence[MoEBlock]) -> None:
    """Refuse ``graph``, in which ``pruned`` (as they were read) have been replaced, if an old choice is still alive.

    Raises:
        UserError: an output of the graph, or another layer, reads it.
    """
    alive = {id(node) for node in graph.nodes}
    for block in pruned:
        choice = _choice(block)
        if choice is None or id(choice) not in alive:
            continue
        shown = _outputs_behind(graph, choice)
        seen_by = f"output {shown[0]!r} shows" if shown else "something else reads"
        raise UserError(
            f"{seen_by} what the router of layer {block.name} chooses, which changes when experts go",
            hint="export the model without its routers' choices among the outputs",
        )


def _choice(block: MoEBlock) -> gs.Node | None:
    """The node that gives the ids, or the gates where there are no ids."""
    router = block.router
    chosen = router.gates if router.slots is None else router.slots.ids
    return None if chosen is None else producer(source(chosen))


def _outputs_behind(graph: gs.Graph, node: gs.Node) -> list[str]:
    """The names of the graph's outputs that are computed from what ``node`` gives."""
    front, seen = [node], {id(node)}
    tensors = []
    while front:
        for tensor in front.pop().outputs:
            tensors.append(tensor)
            fresh = [consumer for consumer in tensor.outputs if id(consumer) not in seen]
            seen.update(map(id, fresh))
            front.extend(fresh)
    behind = {id(tensor) for tensor in tensors}
    return [output.name for output in graph.outputs if id(output) in behind]
