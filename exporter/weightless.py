"""A model without its weights, and the graph that is traced of it.

A trace looks at shapes and dtypes only, so parameters may be fake: a checkpoint larger than memory is traced like any
other, and every weight keeps the name of its parameter. The values are bound when the graph is saved (`exporter.bind`).
"""

import contextlib
import dataclasses
from collections.abc import Container, Iterator, Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from exporter.fold import empty_tensor, fold, names_read
from exporter.upstream import rewritten_quickly
from models.moe_layers import find_moe_layers, tensors_of_routers


@dataclasses.dataclass(frozen=True)
class Traced:
    """A graph whose weights have no values yet.

    Attributes:
        proto: the graph; its weights are initialisers of a shape and a dtype.
        parameters: shape and dtype of every parameter that is read, by its name in the model.
        folded: initialisers that are made of parameters, and the model that makes each.
    """

    proto: onnx.ModelProto
    parameters: Mapping[str, onnx.TensorProto]
    folded: Mapping[str, onnx.ModelProto]


@contextlib.contextmanager
def weightless(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the parameters and persistent buffers of ``model`` are fake, and of ``dtype``.

    1. Other buffers, such as the frequencies of rotary embeddings, keep their values: no checkpoint has them.
    2. Routers compute in float32, whatever ``dtype`` is: of scores that are rounded, others are the highest.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}  # tied weights stay one
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    wide = tensors_of_routers(model)

    def fake(tensor: Tensor) -> Tensor:
        narrow = tensor.is_floating_point() and names.get(id(tensor)) not in wide
        with mode:
            empty = torch.empty(tensor.shape, dtype=dtype if narrow else tensor.dtype, device="cpu")
        is_parameter = isinstance(tensor, nn.Parameter)
        return fakes.setdefault(id(tensor), nn.Parameter(empty, requires_grad=False) if is_parameter else empty)

    held: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]
    routers = [] if dtype == torch.float32 else [layer.router for layer in find_moe_layers(model)]
    hooks = [router.register_forward_pre_hook(_in_float32) for router in routers]
    try:
        for tensors, name, tensor in held:
            tensors[name] = fake(tensor)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensors, name, tensor in held:
            tensors[name] = tensor


def _in_float32(_router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def without_values(program: torch.onnx.ONNXProgram, prefix: str, names: Container[str]) -> Traced:
    """The graph as torch.onnx's optimiser leaves it while the weights are inputs: it has no values to fold.

    Args:
        program: not optimised yet.
        prefix: what stands before names of parameters in it.
        names: of the parameters and persistent buffers of the model.
    """
    graph = program.model.graph
    lifted = [graph.initializers.pop(name) for name in list(graph.initializers) if name.removeprefix(prefix) in names]
    for value in lifted:
        value.name = str(value.name).removeprefix(prefix)
        value.const_value = None
    graph.inputs.extend(lifted)
    with rewritten_quickly():
        program.optimize()
    proto = program.model_proto
    count = len(proto.graph.input) - len(lifted)
    parameters = {value.name: empty_tensor(value.name, value) for value in proto.graph.input[count:]}
    del proto.graph.input[count:]
    folded = fold(proto, parameters)
    read = set(names_read(proto.graph.node))
    values = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*values, *(tensor for name, tensor in parameters.items() if name in read)])
    read.update(value.name for recipe in folded.values() for value in recipe.graph.input)
    return Traced(proto, {name: tensor for name, tensor in parameters.items() if name in read}, folded)
