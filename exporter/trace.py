"""torch to an ONNX graph in memory, traced once, with one experts node a layer and the names of the checkpoint."""

import contextlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import torch
from transformers import PreTrainedModel

from exporter.cache import cache_of, tensors_in
from exporter.experts import IMPLEMENTATION, describe, experts_implementation
from exporter.experts_function import function_of
from exporter.norms import divide_by_roots
from exporter.tasks import Task, part_of
from exporter.upstream import registered_quickly, translatable
from exporter.weightless import Traced, weightless, without_values
from models.moe_layers import MoELayer
from moe_spec.decoder import TOTAL_LENGTH
from moe_spec.errors import UserError
from moe_spec.experts_op import DOMAIN, ExpertsOp
from moe_spec.runner import Arrays, Feeds

TRACED = (2, 5)
"""Batch and sequence of the example that is traced; `exporter.check` runs others."""

_PREFIX = "wrapped."


class _Call(torch.nn.Module):
    """Calls a transformers model by input name and returns a tuple, as the tracer wants it; a cache becomes tensors."""

    def __init__(self, model: PreTrainedModel, task: Task) -> None:
        super().__init__()
        self.wrapped = model
        self._task = task
        part_of(model, task)  # refuse it now

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        task, config = self._task, self.wrapped.config
        given = dict(zip(task.axes, inputs, strict=True))
        past = [given.pop(state.past) for state in task.states]
        cache = cache_of(config, task.states, past) if past else None
        called = part_of(self.wrapped, task)
        options = {"use_cache": False} if hasattr(config.get_text_config(), "use_cache") else {}
        outputs = called(**given, **(options if cache is None else {"past_key_values": cache, "use_cache": True}))
        present = () if cache is None else (tensor for *_, tensor in tensors_in(cache))
        return (*(outputs[name] for name in task.outputs), *present)


def run_torch(model: PreTrainedModel, task: Task, feeds: Feeds) -> Arrays:
    """The model's own outputs, its experts computed by transformers' reference loop."""
    with experts_implementation(model, "eager"):
        return run_as_set(model, task, feeds)


def run_as_set(model: PreTrainedModel, task: Task, feeds: Feeds) -> Arrays:
    """The model's own outputs, its experts computed as it is set to: by default as transformers finds quickest."""
    inputs = [torch.from_numpy(feeds[name]) for name in task.axes]
    with torch.inference_mode():
        outputs = _Call(model, task)(*inputs)
    return {name: value.numpy() for name, value in zip(task.all_outputs, outputs, strict=True)}


def trace(
    model: PreTrainedModel, task: Task, layers: Sequence[MoELayer], opset: int, dtype: torch.dtype = torch.float32
) -> Traced:
    """The model as ONNX, without the values of its weights, if it has any; functions define the experts nodes.

    Args:
        model: in float32.
        task: what it takes and gives.
        layers: those whose experts are a node.
        opset: of the graph.
        dtype: of the graph, but for routers.

    Raises:
        UserError: a model that torch cannot trace.
    """
    variants = {op.op_type: op for layer in layers if (op := describe(layer.experts)) is not None}
    with experts_implementation(model, IMPLEMENTATION), weightless(model, dtype):
        program = _export(model, task, opset, optimize=False)
    traced = without_values(program, _PREFIX, model.state_dict().keys())
    _restore_names(traced.proto)
    divide_by_roots(traced.proto.graph)
    _define_experts(traced.proto, variants, opset)
    return traced


def to_onnx(model: PreTrainedModel, task: Task, opset: int) -> onnx.ModelProto:
    """The model as torch.onnx exports it with the experts implementation that it is set to, weights inside.

    Raises:
        UserError: torch cannot trace the model.
    """
    proto = _export(model, task, opset, optimize=True).model_proto
    _restore_names(proto)
    return proto


def _export(model: PreTrainedModel, task: Task, opset: int, *, optimize: bool) -> torch.onnx.ONNXProgram:
    feeds = task.example(model.config, *TRACED, np.random.default_rng(0))
    dtypes = {state.past: state.dtype for state in task.states}
    tensors = {name: torch.from_numpy(feeds[name]) for name in task.axes}
    inputs = tuple(
        tensor.to(dtypes.get(name, model.dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    )
    with _quiet(), translatable(), registered_quickly(), _explained(type(model).__name__):
        program = torch.onnx.export(
            _Call(model, task).eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=(tuple(dict(axes) for axes in task.axes.values()),),
            input_names=list(task.axes),
            output_names=list(task.all_outputs),
            opset_version=opset,
            optimize=optimize,
            verbose=False,
        )
    assert program is not None
    return program


@contextlib.contextmanager
def _explained(architecture: str) -> Iterator[None]:
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = str(cause).strip().splitlines() or ["no more is said"]
        static = said[0].endswith(":") and len(said) > 1
        reason = said[1].removeprefix("- ") if static else said[0]  # which axis came out static
        raise UserError(
            f"torch.onnx cannot trace {architecture}: {type(cause).__name__}: {reason}",
            hint="`moe-edge families` says which families export; `moe-edge prune` works without ONNX",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's warnings about transformers' own code, and its report that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _restore_names(proto: onnx.ModelProto) -> None:
    """Parameters get the names they have in the checkpoint, and traces of the exporter's paths go."""
    renamed = {
        tensor.name: tensor.name.removeprefix(_PREFIX)
        for tensor in proto.graph.initializer
        if tensor.name.startswith(_PREFIX)
    }
    for tensor in proto.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    del proto.graph.value_info[:]
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
    proto.producer_name, proto.producer_version = "moe-edge", importlib.metadata.version("moe-edge")
    _name_lengths(proto)


def _name_lengths(proto: onnx.ModelProto) -> None:
    """The tracer adds lengths up in any order; the inputs have one."""
    for value in proto.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if set(dim.dim_param.split(" + ")) == set(TOTAL_LENGTH.split(" + ")):
                dim.dim_param = TOTAL_LENGTH


def _define_experts(proto: onnx.ModelProto, variants: Mapping[str, ExpertsOp], opset: int) -> None:
    del proto.functions[:]
    proto.functions.extend(function_of(op, opset) for op in variants.values())
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            node.name = f"{node.input[3].rpartition('.')[0]}"
