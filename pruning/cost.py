"""What a model costs by the experts that its layers keep, and the most that it may."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_spec.errors import UserError
from moe_spec.plan import FULL, REPLACE, LayerPlan, PruningPlan
from pruning.budget import RankedLayer

EXPERTS, BYTES, MILLISECONDS = "experts", "bytes", "ms"

UNITS: Mapping[str, Mapping[str, float]] = {
    BYTES: {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    MILLISECONDS: {"us": 1e-3, "ms": 1, "s": 1e3},
}
"""How people write an amount, and how many of the unit that is."""

FLAGS: Mapping[str, str] = {BYTES: "--max-size", MILLISECONDS: "--max-latency"}


@dataclasses.dataclass(frozen=True)
class AtMost:
    """The most that a model may cost.

    Attributes:
        unit: ``BYTES`` or ``MILLISECONDS``.
        amount: of that unit; or the share of what the whole model costs, above 0 and at most 1.
        is_share: which of the two.
        written: as the user put it.
    """

    unit: str
    amount: float
    is_share: bool
    written: str

    @classmethod
    def parse(cls, text: str, unit: str) -> "AtMost":
        """``--max-size`` or ``--max-latency`` as people write it: 30MB, 3ms, 60% or 0.6 of the whole model.

        Raises:
            UserError: it is none of these.

        >>> AtMost.parse("1.5KiB", BYTES).amount, AtMost.parse("60%", BYTES).limit(50)
        (1536.0, 30.0)
        """
        names = UNITS[unit]
        found = re.fullmatch(rf"(\d+\.?\d*|\.\d+)\s*(%|{'|'.join(names)}|)", text)
        if found:
            number, suffix = float(found[1]), found[2]
            if suffix in names and number > 0:
                return cls(unit, number * names[suffix], is_share=False, written=text)
            share = number / 100 if suffix == "%" else number
            if suffix not in names and 0 < share <= 1:
                return cls(unit, share, is_share=True, written=text)
        raise UserError(
            f"{FLAGS[unit]} {text} is neither an amount nor a share of what the whole model has",
            hint=f"give a number with {', '.join(names)}, or a share above 0 and at most 1, like 0.6 or 60%",
        )

    def limit(self, whole: float) -> float:
        """How much that is where the whole model costs ``whole``."""
        return self.amount * whole if self.is_share else self.amount


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a model costs: ``rest + sum of by_count[layer][count]``.

    Attributes:
        unit: ``EXPERTS``, ``BYTES`` or ``MILLISECONDS``.
        rest: of what no expert has a part in.
        by_count: for each layer what it costs with 0, 1, ... E experts; it never falls.
    """

    unit: str
    rest: float
    by_count: Sequence[Sequence[float]]

    def total(self, counts: Sequence[int]) -> float:
        """With ``counts[layer]`` experts.

        >>> Costs(BYTES, 100, [(0, 10, 20), (0, 5, 10)]).total([1, 2])
        120
        """
        return self.rest + sum(layer[count] for layer, count in zip(self.by_count, counts, strict=True))

    @functools.cached_property
    def whole(self) -> float:
        """With all experts."""
        return self.rest + sum(layer[-1] for layer in self.by_count)


def by_number(layers: Sequence[RankedLayer]) -> Costs:
    """Every expert costs one."""
    return Costs(EXPERTS, 0, [range(layer.experts + 1) for layer in layers])


def by_size(checkpoint: Path, *, trust_remote_code: bool = False) -> Costs:
    """Bytes of the tensors of ``checkpoint``, in the dtypes that they are stored in.

    A row of the router goes with its expert: it is what ``prune`` writes, to the byte, but for its files' headers,
    which are all that is read.

    Raises:
        UserError: no checkpoint of a known family, files that are not complete, or that hold two layers in one list.
    """
    # torch takes seconds to import, and what only names a budget needs none
    from models.checkpoints import load_skeleton, stored_tensors
    from models.moe_layers import find_moe_layers
    from models.stored_names import parameter_names
    from pruning.stream import pruned_parameters, require_by_layer

    skeleton, tensors = load_skeleton(checkpoint, trust_remote_code=trust_remote_code), stored_tensors(checkpoint)
    layers = find_moe_layers(skeleton)
    everyone = (
        LayerPlan(layer.name, layer.num_experts, layer.top_k, tuple(range(layer.num_experts)), groups=layer.groups)
        for layer in layers
    )
    of_experts = pruned_parameters(skeleton, PruningPlan("", "", tuple(everyone)))
    names = parameter_names(skeleton, tensors, checkpoint)
    require_by_layer(of_experts, names, checkpoint)
    sizes: Counter[str] = Counter()
    for stored, name in names.items():
        if name in of_experts:
            sizes[of_experts[name].name] += tensors[stored].nbytes
    rest = sum(tensor.nbytes for tensor in tensors.values()) - sum(sizes.values())
    rows = [range(0, sizes[layer.name] + 1, sizes[layer.name] // layer.num_experts) for layer in layers]
    return Costs(BYTES, rest, rows)


Measure = Callable[[Mapping[int, Sequence[LayerPlan]]], Mapping[int, float]]
"""Milliseconds of a run of the model for each of several plans; injected by whoever can export and run it."""

RUNGS = 5


def by_latency(layers: Sequence[RankedLayer], measure: Measure) -> Costs:
    """Milliseconds a run, measured where all layers keep the same number of experts, at `RUNGS` such numbers.

    In between they are interpolated, and the difference is shared by all layers alike. Where more experts were measured
    to be quicker, they are taken to be as slow as fewer. Which experts are kept is not known yet, and has no part in it
    but for how tokens spread over them; the lowest ids are. Nor are mean outputs, so that those are timed as zeros.

    Raises:
        UserError: a layer that cannot keep any number.
    """
    layers = [dataclasses.replace(layer, router=FULL) if layer.router == REPLACE else layer for layer in layers]
    levels = layers[0].levels()
    rungs = sorted({levels[round(place)] for place in np.linspace(0, len(levels) - 1, RUNGS)})
    times = measure({count: [layer.plan(count) for layer in layers] for count in rungs})
    slowest = np.maximum.accumulate([times[count] for count in rungs])
    by_count = np.interp(range(layers[0].experts + 1), rungs, slowest - slowest[0]) / len(layers)
    return Costs(MILLISECONDS, float(slowest[0]), [by_count.tolist()] * len(layers))


@dataclasses.dataclass(frozen=True)
class Limit:
    """A budget that all layers share.

    Attributes:
        costs: of every count.
        most: that they may cost in all.
        written: as the user put it.
    """

    costs: Costs
    most: float
    written: str

    def holds(self, counts: Sequence[int]) -> bool:
        """Whether layers may keep ``counts`` experts."""
        return self.costs.total(counts) <= self.most * (1 + 1e-12)

    def check(self, layers: Sequence[RankedLayer]) -> None:
        """Refuse a budget that does not even hold the fewest experts that every layer can keep.

        Raises:
            UserError: they cost more.
        """
        counts = [layer.levels()[0] for layer in layers]
        if self.holds(counts):
            return
        flag, smallest = FLAGS[self.costs.unit], self.costs.total(counts)
        shown, nearest = _SHOWN[self.costs.unit](smallest)
        raise UserError(
            f"{flag} {self.written} cannot be reached: with {min(counts)} of {layers[0].experts} experts a layer, the "
            f"fewest, it is {shown}",
            hint=f"the nearest that works: {flag} {nearest}{_instead(layers[0], counts[0])}",
        )


def _instead(layer: RankedLayer, fewest: int) -> str:
    """What would let the layer keep fewer."""
    if fewest == layer.floor > 1:
        return "; or a lower --floor"
    return "; or let K shrink: --clamp-top-k" if fewest == layer.top_k > 1 and not layer.clamp_top_k else ""


_SHOWN: Mapping[str, Callable[[float], tuple[str, str]]] = {
    BYTES: lambda amount: (f"{amount:,.0f} bytes", f"{amount:.0f}B"),
    MILLISECONDS: lambda amount: (f"{amount:.3f} ms", f"{math.ceil(amount * 1000) / 1000:.3f}ms"),
}
"""An amount for people, and as it is given on the command line."""
