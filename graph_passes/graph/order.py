"""Topological order. graphsurgeon's own sort recurses along the graph, and without end where functions meet bodies."""

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import every_node


def sort_nodes(graph: gs.Graph) -> None:
    """Put every node of ``graph``, and of the bodies in it, behind what it reads; otherwise the order stays.

    Raises:
        ValueError: a node needs its own result.
    """
    for body in graph.subgraphs():
        sort_nodes(body)
    local = {id(node) for node in graph.nodes}
    done: dict[int, bool] = {}
    ordered: list[gs.Node] = []
    for root in graph.nodes:
        stack = [] if id(root) in done else [(root, _needed(root))]
        done.setdefault(id(root), False)
        while stack:
            node, needed = stack[-1]
            below = next((other for other in needed if id(other) in local and not done.get(id(other), False)), None)
            if below is None:
                done[id(node)] = True
                ordered.append(node)
                stack.pop()
            elif id(below) in done:
                raise ValueError(f"node {below.op} {below.name!r} needs its own result")
            else:
                done[id(below)] = False
                stack.append((below, _needed(below)))
    graph.nodes = ordered


def tidy(graph: gs.Graph) -> None:
    """Drop the nodes that nobody needs, and put the others in order."""
    graph.cleanup(recurse_functions=False)
    sort_nodes(graph)


def _needed(node: gs.Node) -> Iterator[gs.Node]:
    """The nodes whose results ``node`` reads, itself or in its bodies."""
    for tensor in node.inputs:
        yield from tensor.inputs
    for body in node.subgraphs():
        for inner in every_node(body):
            for tensor in inner.inputs:
                yield from tensor.inputs
