"""Where a candidate went wrong: what the search of `runtime.verification.bisect` finds, as it stands in parity.json."""

import dataclasses

ROUTER, EXPERTS, REST = "router", "experts", "rest"


@dataclasses.dataclass(frozen=True)
class Fault:
    """The first part that computes something else although it was given what the reference's was given.

    Attributes:
        part: `ROUTER` or `EXPERTS` of ``layer``, or `REST`: what lies between the MoE layer before and ``layer``.
        layer: name of the MoE layer; None for what lies behind the last one.
        experts: of `EXPERTS`, those that give something else, by their ids in the source model; where they cannot be
            run by themselves, because an op routes, those whose every token differs.
        error: largest difference of what the part gives, over the largest magnitude; of a router, of a gate. None where
            it is not finite.
        says: what it does, in words.
    """

    part: str
    layer: str | None
    experts: tuple[int, ...]
    error: float | None
    says: str

    @property
    def place(self) -> str:
        """Where it is, in words.

        >>> Fault(EXPERTS, "layers.1.mlp", (2, 5), 0.5, "").place
        'experts 2 and 5 of layer layers.1.mlp'
        >>> Fault(REST, None, (), 0.5, "").place
        'what lies behind the last MoE layer'
        """
        if self.part == REST:
            return (
                "what lies behind the last MoE layer" if self.layer is None else f"what lies before layer {self.layer}"
            )
        if self.part == ROUTER:
            return f"the router of layer {self.layer}"
        if not self.experts:
            return f"the experts of layer {self.layer}"
        return f"expert{'s' * (len(self.experts) > 1)} {listed(self.experts)} of layer {self.layer}"


def listed(numbers: tuple[int, ...]) -> str:
    """In words.

    >>> listed((1, 2, 3))
    '1, 2 and 3'
    """
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last
