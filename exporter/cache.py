"""The cache of a decoder: the tensors that each layer keeps from call to call, and transformers' object made of them.

Every attention layer keeps all tokens, those with a sliding window too: the mask makes the window. So the length of
the cache is the number of tokens seen, the same in all layers, and one graph serves prefill and decode.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from exporter.experts import IMPLEMENTATION, experts_implementation
from exporter.upstream import translatable
from moe_spec.decoder import BATCH, PAST, PAST_LENGTH, PRESENT
from moe_spec.errors import UserError

_ATTENTION = {"keys": "key", "values": "value"}
_LINEAR = {"conv_states": "conv_state", "recurrent_states": "recurrent_state"}

KEPT: Mapping[type, Mapping[str, str]] = {
    DummyLayer: {},
    DynamicLayer: _ATTENTION,
    DynamicIndexedLayer: {**_ATTENTION, "indexer_keys": "indexer_key"},
    LinearAttentionLayer: _LINEAR,
    LinearAttentionAndFullAttentionLayer: {**_LINEAR, **_ATTENTION},
}
"""What cache layers of transformers keep: the attribute, and what it is called in the names of inputs and outputs."""

WITHOUT_WINDOW: Mapping[type, type] = {
    DynamicSlidingWindowLayer: DynamicLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: LinearAttentionAndFullAttentionLayer,
}
"""Layers that forget, and those that stand for them here: their count of tokens is a number that a trace would fix."""

_LENGTHS = (2, 3)
"""Two runs of different lengths tell which axis counts tokens."""


@dataclasses.dataclass(frozen=True)
class State:
    """A tensor that a layer keeps.

    Attributes:
        layer: N in ``past_key_values.N``.
        attribute: of the cache layer.
        index: which one of several, where the attribute is a dict.
        shape: with the names of dynamic axes, the batch first.
        dtype: of the tensor.
    """

    layer: int
    attribute: str
    index: int | None
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Of the input without its prefix, which is that of the output too: ``0.key``."""
        kind = next(kinds[self.attribute] for kinds in KEPT.values() if self.attribute in kinds)
        return f"{self.layer}.{kind}" + (f".{self.index}" if self.index else "")

    @property
    def past(self) -> str:
        """Name of the input."""
        return PAST + self.name

    @property
    def present(self) -> str:
        """Name of the output."""
        return PRESENT + self.name

    @property
    def axes(self) -> dict[int, str]:
        """Names of the dynamic axes, by number."""
        return {axis: dim for axis, dim in enumerate(self.shape) if isinstance(dim, str)}


def find_states(model: PreTrainedModel) -> tuple[State, ...]:
    """What a cache of ``model`` keeps, in the order of its layers. Nothing is computed: shapes alone are propagated.

    Raises:
        UserError: a layer keeps something that is no table of tokens and no state of fixed size, or the model does not
            run with transformers' cache.
    """
    fewer, more = (_shapes(model, length) for length in _LENGTHS)
    return tuple(
        State(layer, attribute, index, _named(model, one.shape, other.shape), one.dtype)
        for (layer, attribute, index, one), (*_, other) in zip(fewer, more, strict=True)
    )


def empty_cache(config: PreTrainedConfig) -> Cache:
    """A cache that has seen no token, whose layers forget none.

    Raises:
        UserError: a layer keeps something else than what is known.
    """
    cache = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if type(layer) in WITHOUT_WINDOW:
            states = {"number_of_states": layer.number_of_states} if hasattr(layer, "number_of_states") else {}
            cache.layers[number] = WITHOUT_WINDOW[type(layer)](**states)
        elif type(layer) not in KEPT:
            raise _no_cache(f"layer {number} keeps a {type(layer).__name__}, not one value for each token")
    return cache


def cache_of(config: PreTrainedConfig, states: Sequence[State], tensors: Sequence[torch.Tensor]) -> Cache:
    """The cache that holds ``tensors``, one for each of ``states``; they are not written to."""
    cache = empty_cache(config)
    for state, tensor in zip(states, tensors, strict=True):
        layer: Any = cache.layers[state.layer]
        layer.dtype, layer.device = tensor.dtype, tensor.device
        if state.index is None:
            setattr(layer, state.attribute, tensor)
            layer.is_initialized = True
            layer.is_indexer_initialized = True
        else:  # such a layer writes into its tensors
            getattr(layer, state.attribute)[state.index] = tensor.clone()
            getattr(layer, f"is_{state.attribute}_initialized")[state.index] = True
            layer.has_previous_state[state.index] = True
            if state.attribute == "conv_states":
                layer.conv_kernel_size[state.index] = tensor.shape[-1]
    return cache


def tensors_in(cache: Cache) -> Iterator[tuple[int, str, int | None, torch.Tensor]]:
    """Layer, attribute, index and tensor of all that a cache holds, in the order of `State`."""
    for number, layer in enumerate(cache.layers):
        for attribute in KEPT[type(layer)]:
            held = getattr(layer, attribute)
            entries = held.items() if isinstance(held, dict) else [(None, held)]
            yield from ((number, attribute, index, tensor) for index, tensor in entries if tensor is not None)


def _shapes(model: PreTrainedModel, length: int) -> list[tuple[int, str, int | None, torch.Tensor]]:
    """What the cache holds after one example of ``length`` tokens, as tensors without values."""
    cache = empty_cache(model.config)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, experts_implementation(model, IMPLEMENTATION), translatable():
        ids = torch.zeros((1, length), dtype=torch.int64)
        named = (*model.named_parameters(), *model.named_buffers())
        weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
        try:
            functional_call(model, weights, kwargs={"input_ids": ids, "past_key_values": cache, "use_cache": True})
        except UserError:  # of an experts node, and no fault of the cache
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise _no_cache(f"{type(error).__name__}: {reason[0]}") from error
        return list(tensors_in(cache))


def _named(model: PreTrainedModel, fewer: Sequence[int], more: Sequence[int]) -> tuple[int | str, ...]:
    """``fewer`` with the axis named that grew as the tokens did."""
    grown = [axis for axis, (one, other) in enumerate(zip(fewer, more, strict=True)) if one != other]
    if any((fewer[axis], more[axis]) != _LENGTHS for axis in grown):
        raise _no_cache(f"a layer of {type(model).__name__} keeps {list(more)} of {_LENGTHS[1]} tokens")
    return (BATCH, *(PAST_LENGTH if axis in grown else dim for axis, dim in enumerate(fewer) if axis > 0))


def _no_cache(why: str) -> UserError:
    return UserError(
        f"the model has no cache that can be an input: {why}", hint="export it without: moe-edge export --no-cache"
    )
