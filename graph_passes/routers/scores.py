"""Read the score that a router makes of its logits, and the bias that only the choice sees.

::

    Softmax(logits)   Sigmoid(logits)   Sqrt(Softplus(logits))          the last is DeepSeek-V4's

torch's softplus is the identity where logits are large: Where(Greater(logits, 20), logits, Softplus(logits)).
"""

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.record.block import FormError
from graph_passes.routers.constants import constant_value
from graph_passes.routers.ranking import last_axis

SCORES = {"Softmax": "softmax", "Sigmoid": "sigmoid", "Sqrt": "sqrtsoftplus"}
"""By the op that comes last."""

LINEAR_FROM = 15.0
"""Beyond this a softplus and its argument are the same number in float32."""


def score_of(values: gs.Tensor) -> tuple[str, gs.Tensor] | None:
    """(score, what it is computed of) of ``values``; None where they are no scores."""
    node = produced_by(source(values), *SCORES)
    if node is None:
        return None
    logits = source(node.inputs[0])
    if node.op != "Sqrt":
        return SCORES[node.op], logits
    softplus = _softplus(logits)
    return None if softplus is None else (SCORES[node.op], softplus)


def _softplus(values: gs.Tensor) -> gs.Tensor | None:
    """x, where ``values`` are softplus(x)."""
    node = produced_by(values, "Softplus", "Where")
    if node is None:
        return None
    if node.op == "Softplus":
        return source(node.inputs[0])
    above, x = produced_by(source(node.inputs[0]), "Greater"), source(node.inputs[1])
    threshold = None if above is None or source(above.inputs[0]) is not x else constant_value(above.inputs[1])
    linear = threshold is not None and threshold >= LINEAR_FROM
    return x if linear and _softplus(source(node.inputs[2])) is x else None


def read_scores(scores: gs.Tensor) -> tuple[str, gs.Tensor]:
    """(score, logits) of ``scores`` (T, E).

    Raises:
        FormError: no function of `SCORES`, or a softmax over something else than the experts.
    """
    found, node = score_of(scores), producer(source(scores))
    if found is None:
        raise FormError("the scores are no softmax, sigmoid or root of a softplus of logits", node)
    if node is not None and node.op == "Softmax" and not last_axis(node, default=-1):
        raise FormError("the softmax is not over the experts", node)
    return found


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
