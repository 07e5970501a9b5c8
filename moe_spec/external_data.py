"""How weights lie in the data file beside an ONNX file, whoever writes it."""

from typing import Any

INLINE_BYTES = 1024
"""Smaller constants stay in the .onnx file: shapes, axes, scales."""

ALIGNMENT = 4096
"""Offsets in the data file are multiples of it, so that runtimes can memory-map each weight."""


def aligned(size: int) -> int:
    """Where the next weight begins in a data file of ``size`` bytes.

    >>> aligned(0), aligned(1)
    (0, 4096)
    """
    return size + -size % ALIGNMENT


def lie_in(tensor: Any, location: str, offset: int, nbytes: int) -> None:
    """Let an ``onnx.TensorProto`` have its values in the file ``location``, ``nbytes`` of them from ``offset`` on."""
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(nbytes))):
        tensor.external_data.add(key=key, value=value)
