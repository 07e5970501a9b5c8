"""The formats that a result is to have: one record, from the command line to the manifest.

Experts are asked for by themselves, and so is everything else but the routers, which compute in float32 whatever is
asked for: a router that is rounded selects other experts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16" by name)
import numpy as np

from graph_passes.casts.assign import WIDE, Formats
from graph_passes.quantization.quantize import BLOCK_SIZES, IN_BLOCKS, NUMBERS, Quantization
from moe_spec.errors import UserError
from moe_spec.formats import FLOATS, FORMATS, require_format


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
        """As a user gave it, in words of people or of ONNX.

        Raises:
            UserError: a format that is unknown, blocks that there are not, or blocks of nothing.
        """
        experts, rest = (None if name is None else require_format(name) for name in (experts, rest))
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

    @property
    def asks_for_floats(self) -> bool:
        """Whether experts or rest are to be in a float format."""
        return bool({self.experts, self.rest} & set(FLOATS))

    @property
    def formats(self) -> Formats | None:
        """What experts and rest are to compute in; None where that is float32.

        Quantised experts compute in what the rest does: their weights are floats when they are multiplied.
        """
        experts = self.rest if self.experts in NUMBERS else self.experts
        formats = Formats(*(np.dtype(FORMATS[name]) if name in FLOATS else WIDE for name in (experts, self.rest)))
        return None if formats == Formats(WIDE, WIDE) else formats

    def over(self, earlier: Mapping[str, Any] | None) -> "Precision":
        """This, and what an ``earlier`` run was asked for where this does not name anything: as a manifest has it."""
        asked = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        known = {field.name for field in dataclasses.fields(self)}
        return Precision(**{name: (earlier or {}).get(name) for name in known} | asked)

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
