"""What every reader of a form owes: its record is the model's, and what is pruned on it computes what it should."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from graph_passes.describe import inspect_model, read_model
from graph_passes.optimize import optimize
from graph_passes.record.block import MoEBlock
from moe_spec.experts_op import Activation
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_models import Spec, compute, save, weights
from tests.graph_passes.block_models.spec import layer_name
from tests.zoo import RUNNER

TOLERANCE = {"float32": 1e-5, "float16": 4e-3}
THREE, ONE, ALL = (1, 4, 5), (5,), tuple(range(8))
CLAMPED = Activation("silu", float(np.float32(1.702)), 7.0, 1.0)
SCOPE = "layers.0.mlp"
"""The layer of a model of one."""


def saved(spec: Spec, folder: Path) -> Path:
    """The model of ``spec`` as a file."""
    save(spec, folder / "block.onnx")
    return folder / "block.onnx"


def written(spec: Spec, folder: Path, form: str) -> Path:
    """The model of ``spec`` with every layer written in ``form``."""
    optimize(saved(spec, folder), folder / form, RUNNER, form=form)
    return folder / form / MODEL


def blocks_of(path: Path, form: str) -> tuple[MoEBlock, ...]:
    """Every MoE layer of the model, all of which have ``form``."""
    model = read_model(path)
    assert {block.form for block in model.blocks} == {form}
    return model.blocks


def assert_pruned_exactly(spec: Spec, folder: Path, *keeps: tuple[int, ...], form: str = "auto") -> Manifest:
    """Optimise to ``keeps``, one a layer: the oracle agrees, numpy agrees, and once more changes nothing."""
    source = saved(spec, folder)
    layers = tuple(
        LayerPlan(layer_name(index), spec.experts, min(spec.top_k, len(keep)), keep, groups=spec.groups)
        for index, keep in enumerate(keeps)
    )
    plan = PruningPlan(onnx_sha256(source), "by hand", layers)
    manifest = optimize(source, folder / "out", RUNNER, plan=plan, form=form)
    x = np.random.default_rng(1).standard_normal((5, spec.hidden)).astype(spec.dtype)
    got = RUNNER.run(folder / "out" / MODEL, [{"x": x}])[0]["out"]
    assert error_between(compute(spec, x, *keeps), got)[1] <= TOLERANCE[spec.dtype]
    again = optimize(folder / "out", folder / "again", RUNNER)
    assert not again.modified
    assert (folder / "again" / MODEL).read_bytes() == (folder / "out" / MODEL).read_bytes()
    return manifest


def assert_fixed_shapes_are_pruned(name: str, folder: Path) -> None:
    """A foreign model exported without dynamic axes is read like the dynamic one, and pruned to `THREE`."""
    entry, path = FOREIGN[name], folder / "fixed.onnx"
    entry.export(entry.make(), dataclasses.replace(entry.inputs, axes={key: {} for key in entry.inputs.axes}), path)
    layers = tuple(
        LayerPlan(block.name, 8, min(block.router.top_k, 3), THREE, groups=block.router.groups)
        for block in blocks_of(path, entry.form)
    )
    manifest = optimize(path, folder / "out", RUNNER, plan=PruningPlan(onnx_sha256(path), "by hand", layers))
    assert [block.experts for block in manifest.blocks] == [3] * entry.layers


def assert_weights_are_original(spec: Spec, block: MoEBlock) -> None:
    """The record's weights are the numbers that were drawn, in the axes of the record."""
    stored, experts = weights(spec), block.experts
    up, down = (array if spec.transposed else array.swapaxes(1, 2) for array in (stored["up"], stored["down"]))
    parts = [up]
    if spec.gated:
        parts = [up[..., 0::2], up[..., 1::2]] if spec.interleaved else np.split(up, 2, axis=-1)
        assert experts.gate_EHF is not None
        np.testing.assert_array_equal(experts.gate_EHF.load(), parts[0])
    np.testing.assert_array_equal(experts.up_EHF.load(), parts[-1])
    np.testing.assert_array_equal(experts.down_EFH.load(), down)
    np.testing.assert_array_equal(block.router.weight_EH.load(), stored["router"])
    if spec.biased:
        assert experts.down_bias_EH is not None
        np.testing.assert_array_equal(experts.down_bias_EH.load(), stored["down_bias"])


def edited(spec: Spec, folder: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """The model of ``spec`` after ``change(graph)``; not every change leaves a model that runs."""
    path = saved(spec, folder)
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return path


def said(path: Path, form: str) -> list[str]:
    """What the reader of ``form`` said of the model's layers."""
    layers = inspect_model(path).unrecognised
    return [str(refusal) for layer in layers for refusal in layer.refusals if refusal.form == form]


def node_of(graph: onnx.GraphProto, output: str) -> onnx.NodeProto:
    """The node that gives ``output``."""
    return next(node for node in graph.node if output in node.output)


def let_read(graph: onnx.GraphProto, output: str, index: int, value: str | np.ndarray) -> None:
    """Let input ``index`` of the node that gives ``output`` be another value, or a constant."""
    if not isinstance(value, str):
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{output}.edited"))
        value = f"{output}.edited"
    node_of(graph, output).input[index] = value


def in_turn(*changes: Callable[[onnx.GraphProto], None]) -> Callable[[onnx.GraphProto], None]:
    """Several changes of a graph as one."""

    def change(graph: onnx.GraphProto) -> None:
        for step in changes:
            step(graph)

    return change


def assert_same_record(left: MoEBlock, right: MoEBlock) -> None:
    """Two blocks with the same router and the same experts, wherever they were read."""
    assert left.router.kind == right.router.kind
    fields = ("top_k", "renormalize", "eps", "scale", "groups", "group_of")
    assert [getattr(left.router, field) for field in fields] == [getattr(right.router, field) for field in fields]
    assert left.experts.activation == right.experts.activation
    for one, other in zip(left.experts.weights(), right.experts.weights(), strict=True):
        np.testing.assert_array_equal(one.load(), other.load())
    np.testing.assert_array_equal(left.router.weight_EH.load(), right.router.weight_EH.load())
