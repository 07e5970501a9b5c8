"""Which GPUs may load a TensorRT-RTX plan, read from its first 64 bytes: a plan cannot be opened without a GPU.

The header is undocumented; magic and mask were found by building for each capability (TensorRT-RTX 1.7).
"""

import struct
from pathlib import Path

from moe_spec.errors import UserError

_MAGIC, _MASK_OFFSET, _HEADER_BYTES = b"vtrt", 32, 64
CAPABILITY_BITS = {"7.5": 1, "8.0": 2, "8.6": 4, "8.9": 8, "12.0": 16, "12.1": 32}
_NEWER = 64  # GPUs newer than 12.0 that did not exist when the library was made


def plan_capabilities(plan: Path) -> list[str]:
    """Compute capabilities that ``plan`` was made for.

    Raises:
        UserError: the file is no TensorRT-RTX plan.
    """
    with plan.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise UserError(f"{plan} is no TensorRT-RTX engine", hint="build it again with `moe-edge build`")
    (mask,) = struct.unpack_from("<I", header, _MASK_OFFSET)
    newer = ["newer"] if mask & _NEWER else []
    return [capability for capability, bit in CAPABILITY_BITS.items() if mask & bit] + newer
