"""Walking over the nodes of an ONNX file, those in the bodies of ``If``, ``Loop`` and ``Scan`` included."""

from collections.abc import Iterator

import onnx


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that ``node`` runs."""
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """``graph``, and every body in it, outer ones first."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from every_graph(body)


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of ``graph`` and of the bodies in it."""
    for part in every_graph(graph):
        yield from part.node
