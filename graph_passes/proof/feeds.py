"""Random inputs for a graph that nobody has told us anything about."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from graph_passes.describe import io_of
from graph_passes.graph.walk import SHAPE_ONLY, is_weight, sink
from graph_passes.record.block import MoEBlock
from moe_spec.decoder import POSITIONS, as_past, axis_lengths, has_cache
from moe_spec.errors import UserError
from moe_spec.runner import Runner

MOST_ELEMENTS = 1 << 28
"""Of one input; no model is proven with more."""

LENGTH = 31
"""The sequence length of the largest inputs."""

IMAGES = 4
"""The rank of inputs of which one example holds many tokens, nobody can tell how many."""

Feeds = dict[str, npt.NDArray[Any]]

Size = tuple[int, int, int]
"""The first dynamic axis, any further one, and the tokens in the cache of a decoder that has one."""


def random_batches(graph: gs.Graph, blocks: Sequence[MoEBlock]) -> list[Feeds]:
    """Inputs at three sizes: a single token or example, an odd count, and more tokens than experts times K."""
    rng = np.random.default_rng(0)
    return [random_feeds(graph, size, rng) for size in _sizes(graph, blocks)]


def batches_for(model: Path, graph: gs.Graph, blocks: Sequence[MoEBlock], runner: Runner) -> list[Feeds]:
    """`random_batches` of ``graph``, that of file ``model``; a decoder's cache holds what it keeps of random tokens.

    Random keys and values are like none that a trained model makes, and it magnifies rounding on them: ten times, of 30
    layers of SmolLM2.
    """
    batches, rng = random_batches(graph, blocks), np.random.default_rng(1)
    if not has_cache(io_of(graph)[0]):
        return batches
    lengths = [(batch, past, 0) for batch, _, past in _sizes(graph, blocks)]
    begun = [random_feeds(graph, size, rng) for size in lengths if size[1]]
    kept = iter(runner.run(model, begun))
    return [feeds | as_past(next(kept)) if size[1] else feeds for feeds, size in zip(batches, lengths, strict=True)]


def _sizes(graph: gs.Graph, blocks: Sequence[MoEBlock]) -> list[Size]:
    """Of decoders with a cache: one that goes on, one that begins, and both at once."""
    wanted = 1 + max((block.num_experts * block.router.top_k for block in blocks), default=0)
    dynamic = {dim or f"{tensor.name}.{axis}" for tensor in graph.inputs for axis, dim in _dynamic(tensor)}
    if len(dynamic) > 1:
        return [(1, 1, 4), (3, 7, 0), (max(2, -(-wanted // LENGTH)), LENGTH, 5)]
    if any(len(tensor.shape) >= IMAGES for tensor in graph.inputs):
        return [(1, 1, 0), (3, 1, 0), (2, 1, 0)]
    return [(1, 1, 0), (7, 1, 0), (max(LENGTH, wanted), 1, 0)]


def _dynamic(tensor: gs.Tensor) -> list[tuple[int, str | None]]:
    return [(axis, dim) for axis, dim in enumerate(tensor.shape) if not isinstance(dim, int)]


def random_feeds(graph: gs.Graph, size: Size, rng: np.random.Generator) -> Feeds:
    """One array an input. Dynamic axes of one name get one size; the first to be met gets ``size[0]``.

    A decoder with a cache gets ``size[2]`` tokens in it, which its mask is for too.

    Floats are standard normal. Integers that index a constant table (an embedding) stay inside it; masks are ones and
    positions count up.
    """
    inputs, _ = io_of(graph)
    dtypes = {spec.name: np.dtype(spec.dtype) for spec in inputs}
    cached = has_cache(inputs)
    names = axis_lengths(inputs, *size) if cached else {}
    feeds = {
        tensor.name: _values(tensor, dtypes[tensor.name], _shape(tensor, names, size), rng) for tensor in graph.inputs
    }
    if cached and POSITIONS in feeds:
        feeds[POSITIONS] += feeds[POSITIONS].dtype.type(size[2])
    return feeds


def _shape(tensor: gs.Tensor, names: dict[str, int], size: Size) -> tuple[int, ...]:
    dims = []
    for axis, dim in enumerate(tensor.shape):
        if isinstance(dim, int):
            dims.append(dim)
        else:
            key = dim or f"{tensor.name}_{axis}"
            dims.append(names.setdefault(key, size[0] if not names else size[1]))
    if not 0 <= math.prod(dims) <= MOST_ELEMENTS or min(dims, default=0) < 0:
        raise UserError(
            f"input {tensor.name!r} has the shape {dims}, too large or too odd to be fed with random numbers",
            hint="check the model; --no-prove writes the result without comparing it",
        )
    return tuple(dims)


def _values(
    tensor: gs.Tensor, dtype: np.dtype[Any], shape: Sequence[int], rng: np.random.Generator
) -> npt.NDArray[Any]:
    if "float" in dtype.name:
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b" or "mask" in tensor.name:
        return np.ones(shape, dtype)
    if "position" in tensor.name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    return rng.integers(0, _index_range(tensor), shape).astype(dtype)


def _index_range(tensor: gs.Tensor) -> int:
    """Rows of the table that ``tensor`` indexes; 2 where it indexes none."""
    for node in sink(tensor, SHAPE_ONLY).outputs:
        if node.op == "Gather" and is_weight(node.inputs[0], 2):
            return int(node.inputs[0].shape[0])
    return 2
