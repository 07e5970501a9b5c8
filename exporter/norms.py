"""Norms in the words that runtimes know: torch writes ``x * (1 / sqrt(v))`` for what they look for as ``x / sqrt(v)``.

Only of the second does ONNX Runtime make one node (its SimplifiedLayerNormFusion): six nodes fewer for every RMSNorm.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import onnx

from exporter.fold import names_read


def divide_by_roots(graph: onnx.GraphProto) -> None:
    """Write ``Mul(x, Reciprocal(Sqrt(v)))`` as ``Div(x, Sqrt(v))`` where nothing else reads the reciprocal.

    >>> import onnx.parser
    >>> text = "g (float[2] x, float[2] v) => (float[2] y) { r = Sqrt(v) s = Reciprocal(r) y = Mul(s, x) }"
    >>> g = onnx.parser.parse_graph(text)
    >>> divide_by_roots(g)
    >>> [(node.op_type, list(node.input)) for node in g.node]
    [('Sqrt', ['v']), ('Div', ['x', 'r'])]
    """
    made_by = {name: node for node in graph.node for name in node.output}
    read = Counter(names_read(graph.node)) + Counter(value.name for value in graph.output)
    gone = set()
    for node in graph.node:
        factors = list(node.input)
        inverse = next((name for name in factors if read[name] == 1 and _is_inverse_root(name, made_by)), None)
        if node.op_type == "Mul" and inverse is not None:
            factors.remove(inverse)
            node.op_type = "Div"
            node.input[:] = [*factors, made_by[inverse].input[0]]
            gone.add(inverse)
    for values in (graph.node, graph.value_info):
        left = [value for value in values if gone.isdisjoint(_names(value))]
        del values[:]
        values.extend(left)


def _names(value: onnx.NodeProto | onnx.ValueInfoProto) -> Iterable[str]:
    return value.output if isinstance(value, onnx.NodeProto) else [value.name]


def _is_inverse_root(name: str, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    inverse = made_by.get(name)
    if inverse is None or inverse.op_type != "Reciprocal":
        return False
    root = made_by.get(inverse.input[0])
    return root is not None and root.op_type == "Sqrt"
