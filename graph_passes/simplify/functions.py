"""Inline model-local functions, so that readers see ops. Only our own experts node stays what it is."""

from collections import Counter
from pathlib import Path

import onnx
import onnx.inliner

from graph_passes.graph.protos import every_node
from moe_spec.errors import UserError
from moe_spec.experts_op import DOMAIN

MOST_NODES = 1_000_000
"""A graph that is larger once its functions are inlined is refused: nested calls multiply."""

DEEPEST = 100
"""As deep may functions call each other."""

FIRST_COMPARABLE = 13
"""From this opset on, ops changed their meaning (Softmax was the last) only where their inputs or attributes did."""

_HINT = "inline the functions with the tool that exported the model"

Key = tuple[str, str]
"""Domain and name of a function."""


def has_calls(model: onnx.ModelProto) -> bool:
    """Whether a function is called that has to be inlined."""
    functions = _foreign(model)
    return bool(functions) and any(_called(node) in functions for node in every_node(model.graph))


def inline_functions(model: onnx.ModelProto, path: Path) -> None:
    """Inline every function of ``model`` but those of `DOMAIN`, in place. Weights are not touched, wherever they lie.

    Raises:
        UserError: a function is written for an opset in which an op means something else.
    """
    functions = _foreign(model)
    for function in functions.values():
        _adopt_opset(model, function, path)
    own = [function for function in model.functions if function.domain == DOMAIN]
    weights = list(model.graph.initializer)
    del model.functions[:], model.graph.initializer[:]
    model.functions.extend(functions.values())
    model.graph.initializer.extend(onnx.TensorProto(name=weight.name) for weight in weights)
    try:
        inlined = onnx.inliner.inline_local_functions(model)
    except RuntimeError as error:
        raise UserError(f"{path}: its functions cannot be inlined: {error}", hint=_HINT) from error
    del inlined.graph.initializer[:], inlined.functions[:]
    inlined.graph.initializer.extend(weights)
    inlined.functions.extend(own)
    model.CopyFrom(inlined)


def _foreign(model: onnx.ModelProto) -> dict[Key, onnx.FunctionProto]:
    return {(function.domain, function.name): function for function in model.functions if function.domain != DOMAIN}


def _called(node: onnx.NodeProto) -> Key:
    return node.domain, node.op_type


def check_calls(model: onnx.ModelProto, path: Path) -> None:
    """Refuse what cannot be inlined because it does not end, or ends beyond `MOST_NODES`.

    Raises:
        UserError: functions that call themselves, or that grow without measure.
    """
    functions = _foreign(model)
    sizes: dict[Key, int] = {}
    open_calls: list[Key] = []

    def size_of(calls: Counter[Key]) -> int:
        return sum(count * (size(key) if key in functions else 1) for key, count in calls.items())

    def size(key: Key) -> int:
        if key in open_calls:
            raise UserError(f"{path}: function {'.'.join(key)} calls itself", hint=_HINT)
        if len(open_calls) > DEEPEST:
            raise UserError(f"{path}: its functions call each other more than {DEEPEST} deep", hint=_HINT)
        if key not in sizes:
            open_calls.append(key)
            sizes[key] = size_of(_calls(functions[key]))
            open_calls.pop()
        return sizes[key]

    total = size_of(_calls(model.graph))
    if total > MOST_NODES:
        raise UserError(
            f"{path} has {total:,} nodes once its functions are inlined, at most {MOST_NODES:,}", hint=_HINT
        )


def _calls(owner: onnx.GraphProto | onnx.FunctionProto) -> Counter[Key]:
    """How often each op stands in a graph or function, bodies included."""
    return Counter(_called(node) for node in every_node(owner))


def _adopt_opset(model: onnx.ModelProto, function: onnx.FunctionProto, path: Path) -> None:
    """Let ``function`` be written for the opsets of the model, where that changes no op in it."""
    ours = {entry.domain: entry.version for entry in model.opset_import}
    for entry in function.opset_import:
        if entry.domain not in ours:
            model.opset_import.add(domain=entry.domain, version=entry.version)
        elif ours[entry.domain] != entry.version:
            for node in every_node(function):
                _check_same_op(node, entry, ours[entry.domain], function, path)
            entry.version = ours[entry.domain]


def _check_same_op(
    node: onnx.NodeProto, theirs: onnx.OperatorSetIdProto, ours: int, function: onnx.FunctionProto, path: Path
) -> None:
    if node.domain != theirs.domain:
        return
    try:
        one, other = (onnx.defs.get_schema(node.op_type, version, node.domain) for version in (theirs.version, ours))
    except onnx.defs.SchemaError:  # not an op of ONNX: another tool's, which has one version
        return
    same = one.since_version == other.since_version
    if not same and (min(theirs.version, ours) < FIRST_COMPARABLE or _signature(one) != _signature(other)):
        raise UserError(
            f"{path}: function {function.domain}.{function.name} is written for opset {theirs.version}, the model for "
            f"opset {ours}, and {node.op_type} changed in between",
            hint=_HINT,
        )


def _signature(schema: onnx.defs.OpSchema) -> tuple[object, object]:
    """Inputs and attributes; two versions of an op that share them differ in the types that they take."""
    attributes = [
        (name, attribute.type, attribute.required, attribute.default_value.SerializeToString())
        for name, attribute in sorted(schema.attributes.items())
    ]
    return [(entry.name, entry.option) for entry in schema.inputs], attributes
