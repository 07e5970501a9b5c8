"""Plans by hand that merge."""

from models.moe_layers import find_moe_layers
from moe_spec.layer_plan import ROWS, LayerPlan, Merge
from moe_spec.plan import PruningPlan

GROUPS = ((0, 2), (1, 3), (4, 7), (5, 6))
"""Who becomes one, inside routing groups where there are any; the second of each survives."""


def merging(model, groups=GROUPS, weights=(1.0, 3.0), router=ROWS, align=True, survivor=-1, **options):
    """A plan that merges ``groups`` in every layer."""
    groups = sorted(groups, key=lambda group: group[survivor])
    merges = tuple(Merge(tuple(group), tuple(weights)) for group in groups)
    keep = tuple(group[survivor] for group in groups)
    layers = tuple(
        LayerPlan(layer.name, 8, layer.top_k, keep, (), layer.groups, router, merges, align)
        for layer in find_moe_layers(model)
    )
    return PruningPlan("", "by hand", layers, options)
