"""A plan without a criterion: the experts that stay are named."""

from collections.abc import Mapping, Sequence

from moe_spec.errors import UserError
from moe_spec.feasibility import ANY, Kernels, check_expert_choice
from moe_spec.layer_plan import REPLACE, ROWS, UNTOUCHED, LayerPlan
from moe_spec.plan import BY_HAND, PruningPlan
from pruning.layers import LayerShape, ModelLayers
from pruning.means import check_replaceable
from pruning.routers import check_router

EVERY_LAYER = ""

Named = Mapping[str, tuple[int, ...]]
"""For a layer, or for `EVERY_LAYER` that is not named, the ids of the experts that stay."""


def parse_experts(texts: Sequence[str]) -> Named:
    """``--experts`` as people write it: ``0,2,5`` for every layer, ``LAYER=0,2,5`` for one.

    Raises:
        UserError: ids that are no numbers, or a layer named twice.

    >>> parse_experts(["0,2", "layers.3.mlp=1"])
    {'': (0, 2), 'layers.3.mlp': (1,)}
    """
    named: dict[str, tuple[int, ...]] = {}
    for text in texts:
        layer, _, ids = text.rpartition("=")
        parts = [part.strip() for part in ids.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise UserError(
                f"--experts {text} names no experts",
                hint="give ids, like --experts 0,2,5, or LAYER=0,2,5 for one layer",
            )
        if layer in named:
            raise UserError(
                f"--experts names {layer or 'every layer'} twice", hint="give one list of ids for each layer"
            )
        named[layer] = tuple(sorted({int(part) for part in parts}))
    return named


def plan_by_hand(
    model: ModelLayers,
    named: Named,
    *,
    clamp_top_k: bool = False,
    router: str = ROWS,
    kernels: Kernels = ANY,
) -> PruningPlan:
    """Keep the experts that ``named`` says; a layer that it does not name keeps all.

    Raises:
        UserError: a layer that the model lacks, experts that a router cannot work with or that ``kernels`` do not
            take, or a router that cannot be.
    """
    check_router(router, clamp_top_k=clamp_top_k)
    if router == REPLACE:
        check_replaceable(model.layers)
    known = [layer.name for layer in model.layers]
    unknown = [name for name in named if name not in (EVERY_LAYER, *known)]
    if unknown:
        raise UserError(
            f"--experts names layer {unknown[0]!r}, which the model lacks",
            hint=f"its MoE layers are: {', '.join(known)}",
        )
    kept = [(layer, named.get(layer.name, named.get(EVERY_LAYER))) for layer in model.layers]
    for layer, ids in kept:
        if ids is not None and ids[-1] >= layer.experts:
            raise UserError(
                f"--experts names expert {ids[-1]}, but layer {layer.name} has {layer.experts}",
                hint=f"its ids are 0 to {layer.experts - 1}",
            )
    layers = tuple(_keep(layer, ids, clamp_top_k, router) for layer, ids in kept if ids is not None)
    for layer, ids in kept:
        kernels.check(layer.name, layer.experts if ids is None else len(ids), layer.top_k)
    return PruningPlan(model.model_sha256, BY_HAND, layers, {"clamp_top_k": clamp_top_k, "router": router})


def _keep(layer: LayerShape, ids: tuple[int, ...], clamp_top_k: bool, router: str) -> LayerPlan:
    if layer.expert_choice:
        check_expert_choice(layer.name, len(ids), full=router in UNTOUCHED)
    top_k = min(layer.top_k, len(ids)) if clamp_top_k else layer.top_k
    return LayerPlan(layer.name, layer.experts, top_k, ids, groups=layer.groups, router=router)
