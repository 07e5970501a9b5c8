"""Number formats: what people call them and what ONNX does. The command line takes both, files hold ONNX's."""

from collections.abc import Collection, Mapping

from moe_spec.errors import UserError, did_you_mean

FORMATS: Mapping[str, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "fp8": "float8e4m3fn",
    "nvfp4": "float4e2m1",
}
"""What people call a format, and what ONNX does, in the order in which they are shown."""

FLOATS: tuple[str, ...] = ("fp32", "fp16", "bf16")
"""Those that a graph computes in; the others are numbers of few bits, which are floats when they are multiplied."""

_SAID = {onnx: said for said, onnx in FORMATS.items()}


def said(name: str) -> str:
    """What people call a format; a name that is none of ONNX's stays.

    >>> said("bfloat16"), said("bf16"), said("w8a8")
    ('bf16', 'bf16', 'w8a8')
    """
    return _SAID.get(name, name)


def in_onnx(name: str) -> str:
    """What ONNX calls a format; a name that is not in `FORMATS` stays.

    >>> in_onnx("bf16"), in_onnx("bfloat16"), in_onnx("w8a8")
    ('bfloat16', 'bfloat16', 'w8a8')
    """
    return FORMATS.get(name, name)


def require_format(name: str, known: Collection[str] = tuple(FORMATS)) -> str:
    """What people call the format ``name``.

    Args:
        name: as people or ONNX call it.
        known: what people call those that will do.

    Raises:
        UserError: it is none of ``known``.
    """
    if said(name) not in known:
        raise UserError(f"unknown precision {name!r}", hint=did_you_mean(name, known))
    return said(name)
