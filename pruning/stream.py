"""Stream: drop experts from files to files. Bytes of survivors are copied as they lie; no weight is ever in memory."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from models.moe_layers import tensors_by_expert
from models.stored_names import EXPERT_ID
from models.tensor_files import AGAIN, StoredTensor
from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan


def pruned_parameters(skeleton: PreTrainedModel, plan: PruningPlan) -> dict[str, LayerPlan]:
    """The router's and experts' parameters and buffers that lose experts, by name."""
    plans = {name: plan.layer(layer.name) for name, layer in tensors_by_expert(skeleton).items()}
    return {name: layer_plan for name, layer_plan in plans.items() if layer_plan is not None}


def lie_by_layer(parameters: Iterable[str], names: Mapping[str, str]) -> bool:
    """Whether stored tensors go to each of ``parameters``. ERNIE 4.5 VL has the experts of two layers in one list.

    ``names``: the parameter that each stored tensor goes to.
    """
    return set(parameters) <= set(names.values())


def require_by_layer(parameters: Iterable[str], names: Mapping[str, str], checkpoint: Path) -> None:
    """Refuse what is read from a checkpoint's files layer by layer, where they hold two layers in one list.

    Raises:
        UserError: see `lie_by_layer`.
    """
    if not lie_by_layer(parameters, names):
        raise UserError(
            f"{checkpoint} has the experts of several layers in one list",
            hint="plan from statistics of `moe-edge calibrate`, by --keep with a number or a share of experts",
        )


def without_dropped(
    tensors: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    pruned: Mapping[str, LayerPlan],
    checkpoint: Path,
    *,
    in_runs: bool = False,
) -> dict[str, StoredTensor]:
    """What is left of the stored tensors of ``checkpoint``; whatever is no router and no expert stays as it is.

    1. One tensor an expert: survivor ``keep[j]`` is renamed to ``j``, a dropped one is left out.
    2. One tensor for all experts, or the router's: ``w (E, ...) -> w[keep] (Ek, ...)``, and so ``w (1, E)``.

    Args:
        tensors: by their names in the files.
        names: the parameter that each goes to.
        pruned: parameters that lose experts.
        checkpoint: named in errors.
        in_runs: see ``Family``.

    Raises:
        UserError: experts are stored in neither way.
    """
    plans = {stored: pruned[name] for stored, name in names.items() if name in pruned}
    require_experts(tensors, {stored: plan.experts for stored, plan in plans.items()}, checkpoint, in_runs=in_runs)
    kept = {}
    for stored, tensor in tensors.items():
        plan, number = plans.get(stored), EXPERT_ID.search(stored)
        if plan is None:
            kept[stored] = tensor
        elif number is None:
            kept[stored] = tensor.rows(plan.keep, plan.experts)
        elif int(number[0]) in plan.keep:
            new = plan.keep.index(int(number[0]))
            kept[f"{stored[: number.start()]}{new}{stored[number.end() :]}"] = tensor
    return kept


def require_experts(
    tensors: Mapping[str, StoredTensor], experts: Mapping[str, int], checkpoint: Path, *, in_runs: bool = False
) -> None:
    """All E experts are there, by their ids or as rows.

    Args:
        tensors: by their names in the files.
        experts: E of the layer that a stored tensor belongs to; of routers and experts only.
        checkpoint: named in errors.
        in_runs: see ``Family``.

    Raises:
        UserError: experts are stored in neither way.
    """
    ids: dict[tuple[str, int], list[int]] = defaultdict(list)
    for stored, count in experts.items():
        if number := EXPERT_ID.search(stored):
            ids[EXPERT_ID.sub("*", stored), count].append(int(number[0]))
        elif not tensors[stored].has_rows(count, in_runs=in_runs):
            raise UserError(
                f"{stored} in {checkpoint} has the shape {list(tensors[stored].shape)}, "
                f"expected {count} experts on its first axis",
                hint="load the checkpoint with transformers and save it again: model.save_pretrained(DIR)",
            )
    for (pattern, count), found in ids.items():
        if sorted(found) != list(range(count)):
            raise UserError(
                f"{checkpoint} has {pattern} for the experts {sorted(found)}, expected 0 to {count - 1}", hint=AGAIN
            )
