"""Every value has a name of its own: branches of one ``If`` may share names, and graphsurgeon finds values by name."""

from collections import Counter
from collections.abc import Mapping

import onnx

from graph_passes.graph.protos import bodies, every_graph


def make_names_unique(graph: onnx.GraphProto) -> None:
    """Rename what a body of ``graph`` defines and another graph defines too, in place."""
    parts = list(every_graph(graph))
    if len(parts) == 1:
        return
    taken = Counter(name for part in parts for name in _defined(part))
    for node in graph.node:
        for body in bodies(node):
            _rename(body, {}, taken)


def _rename(body: onnx.GraphProto, around: Mapping[str, str], taken: Counter[str]) -> None:
    """``around``: the new names of what ``body`` may read from around it."""
    names = {**around, **{name: _fresh(name, taken) for name in _defined(body) if taken[name] > 1}}
    for value in (*body.input, *body.output, *body.initializer, *body.value_info):
        value.name = names.get(value.name, value.name)
    for node in body.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in bodies(node):
            _rename(inner, names, taken)


def _defined(graph: onnx.GraphProto) -> set[str]:
    """What ``graph`` itself gives a name to; the outermost one lists initialisers among its inputs at times."""
    names = {value.name for value in (*graph.input, *graph.initializer)}
    return (names | {name for node in graph.node for name in node.output}) - {""}


def _fresh(name: str, taken: Counter[str]) -> str:
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    taken[f"{name}_{number}"] = 1
    return f"{name}_{number}"
