"""The formats that a result is to have: one record, from the command line to the manifest.

Experts are asked for by themselves, and so is everything else but the routers, which compute in float32 whatever is
asked for: a router that is rounded selects other experts.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from graph_passes.quantize import BLOCK_SIZES, IN_BLOCKS, NUMBERS, Quantization
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
"""What a user calls a format, and what ONNX does; targets know the latter."""

EXPERTS: tuple[str, ...] = ("int8", "int4", "fp8", "nvfp4")
REST: tuple[str, ...] = ("int8", "int4", "fp8", "nvfp4")
"""What is written. A format of `FORMATS` that is missing here is refused by name."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """What a user asked for.

    Attributes:
        experts: format of the experts, one of `FORMATS`; None: they stay what they are.
        rest: of everything else but routers, likewise.
        block_size: inputs that share a scale where weights are quantised, one of `BLOCK_SIZES`; None: all inputs of an
            output channel, or as many as the format says.
    """

    experts: str | None = None
    rest: str | None = None
    block_size: int | None = None

    @classmethod
    def checked(cls, experts: str | None = None, rest: str | None = None, block_size: int | None = None) -> "Precision":
        """As a user gave it.

        Raises:
            UserError: a format that is unknown or not written, blocks that there are not, or blocks of nothing.
        """
        _check_format("experts", experts, EXPERTS)
        _check_format("the rest", rest, REST)
        if block_size is not None and block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise UserError(f"there are no blocks of {block_size} inputs", hint=f"--block-size is one of {known}")
        if block_size is not None and not {experts, rest} & set(IN_BLOCKS):
            raise UserError(
                f"nothing is asked for whose scales {block_size} inputs can share",
                hint=f"leave --block-size out, or ask for one of: {', '.join(IN_BLOCKS)}",
            )
        return cls(experts, rest, block_size)

    @property
    def quantization(self) -> Quantization | None:
        """How the experts are quantised; None where they are not."""
        return self._quantization(self.experts)

    @property
    def rest_quantization(self) -> Quantization | None:
        """How the rest is quantised; None where it is not."""
        return self._quantization(self.rest)

    def _quantization(self, name: str | None) -> Quantization | None:
        if name is None or name not in NUMBERS:
            return None
        return Quantization(name, self.block_size if name in IN_BLOCKS else None)

    def check_accepted(self, accepted: Sequence[str] | None) -> None:
        """Refuse what a target has no kernels for; it takes the formats ``accepted``, or all where that is None.

        Raises:
            UserError: it lacks one.
        """
        for name in (self.experts, self.rest):
            if accepted is not None and name is not None and name not in accepted:
                raise UserError(f"the target does not take precision {name!r}", hint=f"it takes: {', '.join(accepted)}")


AS_IT_IS = Precision()
"""Nothing was asked for."""


def _check_format(what: str, name: str | None, written: Sequence[str]) -> None:
    if name is None or name in written:
        return
    if name not in FORMATS:
        raise UserError(f"unknown precision {name!r}", hint=did_you_mean(name, FORMATS))
    raise UserError(f"{what} cannot be written in {name}", hint=f"known: {', '.join(written)}")
