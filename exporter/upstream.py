"""The one place for what is wrong in transformers and torch.onnx, each with what does the same."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from onnxscript.rewriter import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher
from onnxscript.values import TracedOnnxFunction
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.glm5_next import modeling_glm5_next
from transformers.models.llama4 import modeling_llama4

HEADS: tuple[tuple[Any, int], ...] = ((modeling_deepseek_v2, 1), (modeling_llama4, 2))
"""Modules that turn queries and keys as complex numbers, and the axis on which these have their heads."""


@contextlib.contextmanager
def translatable() -> Iterator[None]:
    """Within the block models compute the same in what ONNX and TensorRT have.

    1. Queries and keys are turned in real numbers, because ONNX hardly knows complex ones.
    2. ``x[mask] = number`` is no search for what is true, a NonZero, which TensorRT-RTX lacks (Muse Spark).
    3. GLM-5-Next's indexer keeps pools of tokens that are valid in no example, of which it chooses none. No trace knows
       how many they are.
    """
    before = [(module, module.apply_rotary_emb) for module, _ in HEADS]
    for module, axis in HEADS:
        module.apply_rotary_emb = functools.partial(_turned, axis)
    indexer: Any = modeling_glm5_next.Glm5NextTextIndexer
    pooled = indexer.get_pooled_states
    indexer.get_pooled_states = _whole(pooled)
    try:
        with _Filled():
            yield
    finally:
        indexer.get_pooled_states = pooled
        for module, turn in before:
            module.apply_rotary_emb = turn


class _Filled(TorchFunctionMode):
    """``x[mask] = number`` fills."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and _is_mask(args[1]) and isinstance(args[2], (bool, int, float)):
            return args[0].masked_fill_(args[1], args[2])
        return func(*args, **(kwargs or {}))


class _Whole(TorchFunctionMode):
    """``x[:, mask]`` is x."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and _is_mask(args[1][-1]):
            return args[0]
        return func(*args, **(kwargs or {}))


def _whole(pooled: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """``pooled`` without its last step."""

    def all_pools(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        with _Whole():
            return pooled(*args, **options)

    return all_pools


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _turned(heads: int, queries: Tensor, keys: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Channels 2 i and 2 i + 1, of all heads, times ``turns`` (B, S, D / 2), which are complex.

    Args:
        heads: the axis of heads among (B, S, D) with it.
        queries: (B, heads, S, D) or (B, S, heads, D).
        keys: likewise.
        turns: complex.
    """
    cos, sin = torch.view_as_real(turns).unsqueeze(heads).unbind(-1)

    def turned(x: Tensor) -> Tensor:
        real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
        return pairs.flatten(-2).type_as(x)

    return turned(queries), turned(keys)


@contextlib.contextmanager
def registered_quickly() -> Iterator[None]:
    """Within the block torch.onnx does not parse its 500 translations to learn their domain, which they know.

    It does so in every export, and of what it parsed takes nothing else: on a tiny model a twelfth of the time.
    https://github.com/microsoft/onnxscript/blob/main/onnxscript/_framework_apis/torch_2_5.py
    """
    function: Any = TracedOnnxFunction
    parsed = function.function_ir
    function.function_ir = property(lambda self: types.SimpleNamespace(domain=self.opset.domain))
    try:
        yield
    finally:
        function.function_ir = parsed


@contextlib.contextmanager
def rewritten_quickly() -> Iterator[None]:
    """Within the block the optimiser of torch.onnx tries a rule only on nodes whose operator the rule ends with.

    A rule of two outputs lists all nodes of the graph before it looks at the one that it is tried on. One such rule
    makes the optimiser quadratic: of 48 layers it took 38 % of the export. https://github.com/microsoft/onnxscript/pull/2427
    plans for the same.
    """
    matcher: Any = SimplePatternMatcher
    match = matcher.match

    def match_same_operator(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        wanted = self.pattern.output_nodes[0].op_identifier()  # None: any
        if wanted is not None and wanted != node.op_identifier():
            return MatchResult().fail("Another operator.")
        return match(self, model, graph, node, **options)

    matcher.match = match_same_operator
    try:
        yield
    finally:
        matcher.match = match
