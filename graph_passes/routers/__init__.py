"""Recognise routers, from whatever they hand to the experts: ids and weights, gates, or logits for a fused op.

Readers of expert forms call one of the functions here. One file an idea: `linear` (logits), `scores`, `groups`,
`ranking`, `finish` (renormalisation and scale), `hits` (0/1 masks), `places` (capacity), `products` (factors of gates),
`sparsemixer` and `rounds` (choices one by one), `slots` and `gates` (how all this is combined).
"""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.record.block import SCORE_FIRST, FormError, Router, Slots
from graph_passes.routers.assemble import Steps, assemble
from graph_passes.routers.finish import Finish
from graph_passes.routers.gates import gate_steps, product_steps
from graph_passes.routers.parameters import Weights, block_scope
from graph_passes.routers.products import Product, factors
from graph_passes.routers.silence import strip_aliases, strip_led, strip_silence
from graph_passes.routers.slots import restricted_steps, slot_steps

__all__ = ["Weights", "block_scope", "read_gates", "read_logits", "read_masked", "read_ranked", "read_slots"]


def read_slots(ids: gs.Tensor, weights: gs.Tensor, weights_of: Weights) -> Router:
    """The router behind ``ids`` (T, K) and ``weights`` (T, K), in any shape that holds these entries in order.

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    led = strip_led(ids, weights)
    router = assemble(slot_steps(led.ids, led.weights), weights_of, slots=Slots(ids, weights))
    return dataclasses.replace(router, leads_to=led.leads_to, gathered=led.leads_to is not None, aliases=led.aliases)


def read_gates(gates_TE: gs.Tensor, weights_of: Weights) -> Router:
    """The router behind ``gates_TE`` (T, E), 0 where an expert is not selected, in any shape of these entries in order.

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    if (shared := strip_aliases(gates_TE)) is not None:
        of_rows, first_rows, aliases = shared
        steps, slots = gate_steps(of_rows)
        router = assemble(steps, weights_of, slots=slots, gates=gates_TE)
        return dataclasses.replace(router, leads_to=first_rows, gathered=True, aliases=aliases)
    every_gate, leads_to = strip_silence(gates_TE)
    steps, slots = gate_steps(every_gate)
    router = assemble(steps, weights_of, slots=slots, gates=gates_TE)
    gathered = produced_by(source(gates_TE), "Gather") is not None
    return dataclasses.replace(router, leads_to=leads_to, gathered=gathered and leads_to is not None)


def read_masked(mask: gs.Tensor, weights: gs.Tensor, weights_of: Weights) -> Router:
    """The router behind a 0/1 ``mask`` (T, E) or (T, K, E) and what multiplies it: weights (T, 1), (T, K), or (T, E).

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    node = producer(source(mask))
    if node is None:
        raise FormError("the mask of the chosen experts is not computed", mask)
    steps, slots = product_steps(factors(mask) * Product(values=(source(weights),)), node)
    return assemble(steps, weights_of, slots=slots)


def read_logits(logits: gs.Tensor, *, top_k: int, renormalize: bool, weights_of: Weights) -> Router:
    """The router of an op that takes ``logits`` (T, E) and makes softmax, top-k and renormalisation itself.

    Raises:
        FormError: the logits are no constant projection.
    """
    steps = Steps("softmax", SCORE_FIRST, top_k, source(logits), logits, logits, Finish(renormalize=renormalize))
    return assemble(steps, weights_of)


def read_ranked(ranked: gs.Tensor, scores: gs.Tensor, *, top_k: int, renormalize: bool, weights_of: Weights) -> Router:
    """The router of an op that takes what is to be ``ranked`` (T, E) and the ``scores`` (T, E) that weigh the best.

    Raises:
        FormError: what is ranked is not made of the scores, or they of no constant projection.
    """
    return assemble(restricted_steps(ranked, scores, top_k, Finish(renormalize=renormalize)), weights_of)
