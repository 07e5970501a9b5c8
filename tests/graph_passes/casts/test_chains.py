"""Whatever ops follow each other: types are exact, casts are few, and nothing but rounding happens."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graph_passes.casts import cast_graph
from graph_passes.casts.assign import WIDE, Formats
from graph_passes.model_file import save_graph
from graph_passes.proof.retype import WIDENED, save_retyped
from moe_spec.manifest import MODEL
from moe_spec.runner import error_between
from tests.graph_passes.casts.texts import HALF
from tests.zoo import RUNNER

CONSTANTS = {
    "kernel": np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4),
    "bias": np.linspace(0.1, 1, 4, dtype=np.float32),
    "lowest": np.array(-3e38, np.float32),
    "small": np.array(1e-12, np.float32),
    "two": np.array(2, np.float32),
    "last": np.array([-1], np.int64),
    "order": np.array([1, 0], np.int64),
    "shape": np.array([2, 4], np.int64),
}

ONE = {
    "MatMul": ("kernel",),
    "Gemm": ("kernel",),
    "Add": ("bias",),
    "Mul": ("bias",),
    "Max": ("lowest",),
    "Clip": ("small",),
    "Pow": ("two",),
    "ReduceMean": ("last",),
    "Softmax": (),
    "Tanh": (),
    "Relu": (),
    "Sqrt": (),
    "Cos": (),
    "Gather": ("order",),
    "Reshape": ("shape",),
    "Identity": (),
}
"""Ops of one value, and the constants that they read."""

TWO = ("Add", "Mul", "Sub", "MatMul", "Where")


@st.composite
def chains(draw: st.DrawFn) -> onnx.ModelProto:
    """(2, 4) values, each made of those before it; (2, 4) is what any of them gives."""
    values, nodes = ["x"], []
    for index in range(draw(st.integers(1, 8))):
        name, source = f"v{index}", draw(st.sampled_from(values))
        if draw(st.booleans()):
            op = draw(st.sampled_from(sorted(ONE)))
            safe = [helper.make_node("Abs", [source], [f"{name}_positive"])] if op == "Sqrt" else []
            inputs = [f"{name}_positive" if safe else source, *ONE[op]]
            full = f"{name}_mean" if op == "ReduceMean" else name
            nodes += [*safe, helper.make_node(op, inputs, [full])]
            if full != name:
                nodes.append(helper.make_node("Sub", [source, full], [name]))
        else:
            op, other = draw(st.sampled_from(TWO)), draw(st.sampled_from(values))
            if op == "MatMul":
                nodes.append(helper.make_node("Transpose", [other], [f"{name}_turned"], perm=[1, 0]))
                nodes.append(helper.make_node("MatMul", [source, f"{name}_turned"], [f"{name}_square"]))
                nodes.append(helper.make_node("MatMul", [f"{name}_square", other], [name]))
            elif op == "Where":
                nodes.append(helper.make_node("Less", [source, other], [f"{name}_less"]))
                nodes.append(helper.make_node("Where", [f"{name}_less", source, other], [name]))
            else:
                nodes.append(helper.make_node(op, [source, other], [name]))
        values.append(name)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", values[-1])]
    weights = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in CONSTANTS.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def assert_few_casts(model: onnx.ModelProto) -> None:
    """No cast reads a cast, none is there twice, and none casts to what its value is in already."""
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    made = {node.output[0] for node in casts}
    assert not any(node.input[0] in made for node in casts)
    wanted = [(node.input[0], node.attribute[0].i) for node in casts]
    assert len(set(wanted)) == len(wanted)
    typed = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.input)}
    types |= {value.name: value.data_type for value in typed.initializer}
    assert all(types[name] != to for name, to in wanted)


@settings(max_examples=40)
@given(chains())
def test_types_are_exact_casts_are_few_and_only_rounding_happens(model):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(model, folder / "float32.onnx")
        graph = cast_graph(folder / "float32.onnx", Formats(WIDE, HALF))
        save_graph(graph, folder, folder / MODEL)
        onnx.checker.check_model(str(folder / MODEL), full_check=True)
        result = onnx.load(folder / MODEL)
        assert_few_casts(result)
        halves = {value.name: value for value in result.graph.initializer if value.data_type == TensorProto.FLOAT16}
        for value in model.graph.initializer:
            if value.name in halves:
                rounded = onnx.numpy_helper.to_array(value).astype(HALF)
                np.testing.assert_array_equal(onnx.numpy_helper.to_array(halves[value.name]), rounded)
                value.CopyFrom(onnx.numpy_helper.from_array(rounded.astype(np.float32), value.name))
        onnx.save(model, folder / "rounded.onnx")
        save_retyped(folder / MODEL, folder / "widened.onnx", WIDENED)
        feeds = [{"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}]
        (wanted,), (found,) = (RUNNER.run(folder / f"{name}.onnx", feeds) for name in ("rounded", "widened"))
        for output, value in wanted.items():
            if np.isfinite(value).all():
                assert error_between(value, found[output])[1] <= 1e-6
        (run,) = RUNNER.run(folder / MODEL, feeds)
        assert all(run[output].dtype == np.float32 for output in wanted)
