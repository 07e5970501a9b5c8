"""What a model costs by the experts that its layers keep: in experts, in bytes, in milliseconds."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_spec.layer_plan import FULL, REPLACE, LayerPlan
from moe_spec.plan import BYTES, EXPERTS, MILLISECONDS, PruningPlan
from pruning.budget.ranked import RankedLayer


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
