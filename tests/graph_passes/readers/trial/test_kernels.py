"""The ops that move tokens compute what ONNX says, and refuse what would fill the memory."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from graph_passes.readers.trial.kernels import KERNELS, widened

FLOATS = np.arange(12.0, dtype=np.float32).reshape(3, 4)
IDS = np.asarray([[2, 0], [1, 2], [0, 1]])
FLAT = np.asarray([2, 0, 1, 2, 0, 1])
TABLE = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
ROW = np.asarray([5, -3, 8, 1])

CASES: dict[str, list[tuple[Any, ...]]] = {
    "Abs": [(ROW,)],
    "Add": [(FLOATS, FLOATS[0])],
    "And": [(ROW > 0, ROW > 4)],
    "Cast": [
        (FLOATS / 3, {"to": TensorProto.INT64}),
        (ROW, {"to": TensorProto.BOOL}),
        (ROW, {"to": TensorProto.FLOAT}),
    ],
    "CastLike": [(ROW, FLOATS)],
    "Clip": [(FLOATS, np.float32(2), np.float32(7)), (FLOATS, None, np.float32(7))],
    "Concat": [(FLOATS, FLOATS, {"axis": 0}), (FLOATS, FLOATS, {"axis": -1})],
    "ConstantOfShape": [(np.asarray([2, 3]),)],
    "CumSum": [(FLAT, np.asarray(0)), (FLAT, np.asarray(0), {"exclusive": 1})],
    "Div": [(ROW, np.asarray(2)), (ROW, np.asarray(-2)), (FLOATS, np.float32(3))],
    "Equal": [(IDS, np.asarray(2))],
    "Expand": [(ROW, np.asarray([3, 1])), (FLOATS[:, :1], np.asarray([1, 4]))],
    "Flatten": [(TABLE, {"axis": 2}), (TABLE,)],
    "Floor": [(FLOATS / 3,)],
    "Gather": [(FLOATS, FLAT, {"axis": 0}), (FLOATS, np.asarray(1), {"axis": 1}), (TABLE, IDS, {"axis": 0})],
    "GatherElements": [(FLOATS, IDS, {"axis": 1})],
    "GatherND": [(FLOATS, IDS[:, :1]), (FLOATS, IDS)],
    "Greater": [(ROW, np.asarray(1))],
    "GreaterOrEqual": [(ROW, np.asarray(1))],
    "Identity": [(FLOATS,)],
    "Less": [(ROW, np.asarray(1))],
    "LessOrEqual": [(ROW, np.asarray(1))],
    "Max": [(FLOATS, FLOATS[0] * 2), (FLOATS,)],
    "Mod": [(ROW, np.asarray(3)), (ROW, np.asarray(3), {"fmod": 1})],
    "Mul": [(FLOATS, FLOATS[0])],
    "Neg": [(ROW,)],
    "NonZero": [(IDS,)],
    "Not": [(ROW > 0,)],
    "OneHot": [(IDS, np.asarray(4), np.asarray([0, 1]))],
    "Or": [(ROW > 0, ROW > 4)],
    "Range": [(np.asarray(1), np.asarray(7), np.asarray(2))],
    "ReduceSum": [(FLOATS, np.asarray([0]), {"keepdims": 0}), (FLOATS,), (FLOATS, None, {"noop_with_empty_axes": 1})],
    "Reshape": [(FLOATS, np.asarray([-1, 6])), (FLOATS, np.asarray([0, 2, 2]))],
    "ScatterElements": [
        (np.zeros((3, 4), np.float32), IDS, FLOATS[:, :2], {"axis": 1}),
        (np.zeros(3, np.float32), FLAT, np.ones(6, np.float32), {"axis": 0, "reduction": "add"}),
    ],
    "ScatterND": [
        (np.zeros((3, 4), np.float32), FLAT[:3, None], FLOATS),
        (np.zeros((3, 4), np.float32), FLAT[[0, 0, 1], None], FLOATS, {"reduction": "add"}),
    ],
    "Shape": [(FLOATS,), (TABLE, {"start": 1}), (TABLE, {"start": -2, "end": -1})],
    "Sign": [(ROW,)],
    "Size": [(FLOATS,)],
    "Slice": [
        (FLOATS, np.asarray([1]), np.asarray([4]), np.asarray([1]), np.asarray([2])),
        (FLOATS, np.asarray([0, 1]), np.asarray([2, 9])),
        (FLOATS, np.asarray([-1]), np.asarray([-9]), np.asarray([0]), np.asarray([-1])),
    ],
    "Split": [(FLOATS, {"axis": 1, "num_outputs": 2}), (FLOATS, np.asarray([1, 2]), {"axis": 0})],
    "Squeeze": [(FLOATS[:1], np.asarray([0])), (FLOATS[:1],)],
    "Sub": [(FLOATS, FLOATS[0])],
    "Sum": [(FLOATS, FLOATS, FLOATS)],
    "Tile": [(ROW, np.asarray([2]))],
    "TopK": [(FLAT, np.asarray([6]), {"largest": 0, "axis": 0}), (FLOATS % 3, np.asarray([2]), {"axis": -1})],
    "Transpose": [(TABLE, {"perm": [2, 0, 1]}), (FLOATS,)],
    "Unsqueeze": [(ROW, np.asarray([0, 2]))],
    "Where": [(FLOATS > 5, FLOATS, np.float32(0))],
}
"""Inputs and attributes for each op; None is an input left out."""


def test_every_kernel_has_a_case():
    assert set(CASES) == set(KERNELS)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
def test_a_kernel_computes_what_onnx_says(op, case):
    attributes = case[-1] if isinstance(case[-1], dict) else {}
    inputs = [None if value is None else np.asarray(value) for value in case if not isinstance(value, dict)]
    outputs = ["a", "b"] if op in ("Split", "TopK") else ["a"]
    names = ["" if value is None else f"x{index}" for index, value in enumerate(inputs)]
    node = helper.make_node(op, names, outputs, **attributes)
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    wanted = _reference(node, feeds)
    ours = gs.Node(op, attrs=attributes, outputs=[gs.Variable(name) for name in outputs])
    got = KERNELS[op](ours, [None if value is None else widened(value) for value in inputs])
    for one, other in zip(got if isinstance(got, list) else [got], wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert one.shape == other.shape


def _reference(node: onnx.NodeProto, feeds: dict[str, np.ndarray]) -> Any:
    typed = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "one", typed, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return ReferenceEvaluator(model).run(None, feeds)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("ConstantOfShape", [np.asarray([1 << 30, 1 << 30])]),
        ("Expand", [ROW, np.asarray([1 << 40, 4])]),
        ("Range", [np.asarray(0), np.asarray(1 << 40), np.asarray(1)]),
        ("Tile", [ROW, np.asarray([1 << 40])]),
        ("OneHot", [IDS, np.asarray(1 << 40), np.asarray([0, 1])]),
    ],
)
def test_a_value_that_would_fill_the_memory_is_refused(op, inputs):
    with pytest.raises(ValueError, match=r"^it would have shape \["):
        KERNELS[op](gs.Node(op, outputs=[gs.Variable("y")]), inputs)
