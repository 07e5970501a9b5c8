"""The oracle's reference where a router stays full: the *original* graph in which the dropped experts' gates are 0.

The router chooses as ever, and a token that chose a dropped expert gets nothing from it: that is the definition of a
full router. Where the graph has gates, or weights beside ids, those of the dropped experts are multiplied by 0. Two
kinds of forms have no such value. A dispatch spreads the weights over places: its combine weights are multiplied. A
fused op routes by itself: what its dropped experts give is multiplied instead, in their last projection.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.graph.walk import producer, replace_reads
from graph_passes.readers.dispatch import is_placed
from graph_passes.record.block import MoEBlock, Slots
from graph_passes.variants.observe import Mask, mask_E

LAST_PROJECTION: Mapping[str, tuple[int, int]] = {"moe": (4, 5), "qmoe": (6, 7)}
"""Inputs of the fused ops: fc2 (its scales, where it is quantised), and the bias of fc2."""


def silence_block(emitter: Emitter, block: MoEBlock, dropped: Sequence[int]) -> MoEBlock:
    """Set the gates of the experts ``dropped`` of ``block`` to 0, in place; the block with the values it has now."""
    if not dropped:
        return block
    return _SILENCERS.get(block.form, _silence_gates)(emitter.within("silenced"), block, dropped)


def zero_slots(emitter: Emitter, slots: Slots, kept: Mask) -> Slots:
    """``slots`` whose weights are 0 where ``kept`` (E,) is 0, for whoever reads them."""
    readers = list(slots.weights.outputs)
    of_slots = emitter.emit("Gather", emitter.array("kept", kept), slots.ids, label="kept_slots", axis=0)
    shape = emitter.emit("Shape", slots.weights, label="weights_shape")
    shaped = emitter.emit("Reshape", of_slots, shape, label="kept_shaped")
    typed = emitter.emit("CastLike", shaped, slots.weights, label="kept_typed")
    weights = emitter.emit("Mul", slots.weights, typed, label="weights")
    _let_read(readers, slots.weights, weights)
    return Slots(slots.ids, weights)


def _silence_gates(emitter: Emitter, block: MoEBlock, dropped: Sequence[int]) -> MoEBlock:
    router = block.router
    kept = 1 - mask_E(block.num_experts + 1, dropped, 1.0)  # an id beyond the last expert leads to none
    if router.gates is None:
        assert router.slots is not None
        slots = zero_slots(emitter, router.slots, kept)
        return dataclasses.replace(block, router=dataclasses.replace(router, slots=slots))
    readers, columns = list(router.gates.outputs), block.num_experts - router.unranked
    by_token = emitter.reshape(router.gates, (-1, columns), "gates")
    row = emitter.emit("CastLike", emitter.array("kept", kept[:columns]), by_token, label="kept_typed")
    silent = emitter.emit("Mul", by_token, row, label="silent_gates")
    shape = emitter.emit("Shape", router.gates, label="gates_shape")
    gates = emitter.emit("Reshape", silent, shape, label="silent_gates_shaped")
    _let_read(readers, router.gates, gates)
    return dataclasses.replace(block, router=dataclasses.replace(router, gates=gates))


def _silence_dispatch(emitter: Emitter, block: MoEBlock, dropped: Sequence[int]) -> MoEBlock:
    einsum = producer(block.out)
    assert einsum is not None
    combine = einsum.inputs[0 if is_placed(einsum.inputs[0]) else 1]
    column = emitter.array("kept", 1 - mask_E(block.num_experts, dropped, 1.0)[:, None])
    typed = emitter.emit("CastLike", column, combine, label="kept_typed")
    _let_read([einsum], combine, emitter.emit("Mul", combine, typed, label="silent_combine"))
    return block


def _silence_fused(emitter: Emitter, block: MoEBlock, dropped: Sequence[int]) -> MoEBlock:
    op = producer(block.out)
    assert op is not None
    for index in LAST_PROJECTION[block.form]:
        if index < len(op.inputs) and not op.inputs[index].is_empty():
            weight = op.inputs[index]
            kept = 1 - mask_E(block.num_experts, dropped, 1.0)
            column = emitter.array("kept", kept.reshape(-1, *(1 for _ in weight.shape[1:])))
            typed = emitter.emit("CastLike", column, weight, label="kept_typed")
            op.inputs[index] = emitter.emit("Mul", weight, typed, label="silent_projection")
    return block


def _let_read(readers: Sequence[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    replace_reads(old, new, except_by=[node for node in old.outputs if all(node is not reader for reader in readers)])


_SILENCERS: Mapping[str, Callable[[Emitter, MoEBlock, Sequence[int]], MoEBlock]] = {
    "dispatch": _silence_dispatch,
    "moe": _silence_fused,
    "qmoe": _silence_fused,
}
"""Forms whose graph has neither gates nor weights of slots that all experts read."""
