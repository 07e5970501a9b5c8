"""An ``If`` whose condition is a constant becomes the branch that it takes."""

import onnx_graphsurgeon as gs

from graph_passes.graph.order import tidy
from graph_passes.graph.walk import produced_by, replace_uses

BRANCHES = {True: "then_branch", False: "else_branch"}


def fold_conditions(graph: gs.Graph) -> bool:
    """Replace every ``If`` with a constant condition by its branch, in bodies too; whether there was one."""
    folded = _fold(graph)
    if folded:
        tidy(graph)
    return folded


def _fold(part: gs.Graph) -> bool:
    """The same for ``part``, a graph or a body; what a branch brings along is looked at in its turn."""
    folded, waiting = False, list(part.nodes)
    while waiting:
        node = waiting.pop()
        condition = known_condition(node.inputs[0]) if node.op == "If" and node.domain in (None, "") else None
        if condition is None:
            for body in node.subgraphs():
                folded |= _fold(body)
        else:
            waiting += _splice(part, node, condition)
            folded = True
    return folded


def known_condition(tensor: gs.Tensor) -> bool | None:
    """The value of a condition that no input can change; None where one can."""
    if isinstance(tensor, gs.Constant):
        return bool(tensor.values.reshape(-1)[0]) if tensor.values.size == 1 else None
    node = produced_by(tensor, "Not", "Identity", "Cast")
    inner = None if node is None else known_condition(node.inputs[0])
    return (not inner) if inner is not None and node is not None and node.op == "Not" else inner


def _splice(part: gs.Graph, node: gs.Node, condition: bool) -> list[gs.Node]:
    """Put the nodes of the branch that ``node`` takes in its place; these nodes."""
    branch: gs.Graph = node.attrs[BRANCHES[condition]]
    results, given = list(node.outputs), list(branch.outputs)
    nodes = list(branch.nodes)
    detach(node.attrs[BRANCHES[not condition]])
    part.nodes = [other for other in part.nodes if other is not node]  # `remove` compares by value
    node.inputs.clear()
    node.outputs.clear()
    part.nodes.extend(nodes)
    for old, new in zip(results, given, strict=True):
        replace_uses(part, old, new)
    return nodes


def detach(body: gs.Graph) -> None:
    """Let the values around ``body`` forget that its nodes read them."""
    for node in body.nodes:
        for inner in node.subgraphs():
            detach(inner)
        node.inputs.clear()
