"""Values of a few bits, several in a byte of a uint8 tensor, as contrib ops have them: the first in the lowest bits."""

import dataclasses

import numpy as np
import numpy.typing as npt

from graph_passes.weights.stored import packed_bytes
from graph_passes.weights.weight import Array, Weight, bits_of


def unpacked(weight: Weight, dtype: npt.DTypeLike) -> Weight:
    """uint8 (..., bytes) as the values of ``dtype`` (..., values) that its bytes hold.

    >>> from graph_passes.weights.weight import from_array
    >>> unpacked(from_array(np.array([[0x21, 0x43]], np.uint8)), "uint4").load().tolist()
    [[1, 2, 3, 4]]
    """
    dtype = np.dtype(dtype)
    each = 8 // bits_of(dtype)
    if each == 1:
        return weight
    shape = (*weight.shape[:-1], weight.shape[-1] * each)
    values = weight.map(shape, lambda octets: _split(octets, dtype).reshape(-1, *shape[1:]), row_wise=True)
    return dataclasses.replace(values, dtype=dtype)


def packed(weight: Weight) -> Weight:
    """Values (..., values) as uint8 (..., bytes); the last axis fills whole bytes.

    >>> from graph_passes.weights.weight import from_array
    >>> packed(from_array(np.array([[1, 2, 3, 4]], "uint4"))).load().tolist()
    [[33, 67]]
    """
    each = 8 // bits_of(weight.dtype)
    assert weight.shape[-1] % each == 0
    shape = (*weight.shape[:-1], weight.shape[-1] // each)
    octets = weight.map(shape, lambda rows: packed_bytes(rows).view(np.uint8).reshape(-1, *shape[1:]), row_wise=True)
    return dataclasses.replace(octets, dtype=np.dtype(np.uint8))


def fill(rows: Array, length: int) -> Array:
    """``rows`` (..., n) with zeros up to ``length`` entries, so that they end where bytes end."""
    missing = np.zeros((*rows.shape[:-1], length - rows.shape[-1]), rows.dtype)
    return np.concatenate([rows, missing], axis=-1)


def _split(octets: Array, dtype: np.dtype[np.generic]) -> Array:
    bits = bits_of(dtype)
    parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).view(dtype)
