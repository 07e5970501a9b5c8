"""Read the score that a router makes of its logits, and the bias that only the choice sees."""

import onnx_graphsurgeon as gs

from graph_passes.block import FormError
from graph_passes.routers.ranking import last_axis
from graph_passes.walk import produced_by, producer, source

SCORES = {"Softmax": "softmax", "Sigmoid": "sigmoid"}


def read_scores(scores: gs.Tensor) -> tuple[str, gs.Tensor]:
    """(score, logits) of ``scores`` (T, E).

    Raises:
        FormError: no softmax over the experts and no sigmoid.
    """
    node = produced_by(source(scores), *SCORES)
    if node is None:
        raise FormError("the scores are neither a softmax nor a sigmoid of logits", producer(source(scores)))
    if node.op == "Softmax" and not last_axis(node, default=-1):
        raise FormError("the softmax is not over the experts", node)
    return SCORES[node.op], source(node.inputs[0])


def read_selection_bias(choice: gs.Tensor, scores: gs.Tensor) -> gs.Constant | None:
    """The constant that is added to ``scores`` before they are ranked.

    Raises:
        FormError: what is ranked is something else.
    """
    if source(choice) is source(scores):
        return None
    added = produced_by(source(choice), "Add")
    if added is not None:
        for this, other in ((0, 1), (1, 0)):
            bias = source(added.inputs[other])
            if source(added.inputs[this]) is source(scores) and isinstance(bias, gs.Constant):
                return bias
    raise FormError("what is ranked is not the scores plus a constant bias", producer(source(choice)))
