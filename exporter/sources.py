"""Where the values of a model's parameters come from: the files of a checkpoint, or a model that is in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exporter.bind import Pieces
from models.checkpoints import load_empty, load_model
from models.moe_layers import tensors_by_expert
from models.stored_merges import StoredMerges, fill_routers
from models.stored_names import is_cut
from models.stored_parameters import StoredParameters
from moe_spec.errors import UserError
from moe_spec.plan import PruningPlan

Prepare = Callable[[PreTrainedModel], None]
"""Changes a model before it is exported, as ``pruning.apply.apply_plan`` does."""


APPLY = "apply the plan too: export(..., plan=plan, prepare=partial(pruning.apply.apply_plan, plan=plan))"
"""Hint where a plan was given and not applied."""


def require_merging(plan: PruningPlan | None, prepare: Prepare | None) -> None:
    """Refuse a plan by which rows share merged experts where nothing merges them: their number would not tell.

    Raises:
        UserError: there is no ``prepare``.
    """
    if plan is not None and plan.shares_experts and prepare is None:
        raise UserError("by the plan rows of routers share merged experts, but nothing merges them here", hint=APPLY)


def open_model(
    checkpoint: Path, plan: PruningPlan | None, prepare: Prepare | None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Pieces]:
    """The model to trace, and the values of its parameters.

    Where experts are only dropped or merged, the model has no values, but for the routers of a plan that merges, and no
    more of the checkpoint is read than what is left of it. Where ``prepare`` makes new values that no plan tells of, or
    where the loader cuts what is stored, they are those of the model in memory.

    Raises:
        UserError: no checkpoint, an unknown family, or what ``prepare`` refuses.
    """
    model = load_empty(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
    if is_cut(model) or (prepare is not None and plan is None):
        model = prepared(checkpoint, prepare, trust_remote_code=trust_remote_code)
        return model, pieces_of(model)
    stored, whole = StoredParameters(checkpoint, torch.float32, trust_remote_code=trust_remote_code), model.state_dict()
    if prepare is None or plan is None:
        return model, lambda name, dtype: stored.pieces(name, None, dtype)
    layers = {name: layer.name for name, layer in tensors_by_expert(model).items()}
    averaged = fill_routers(model, stored) if plan.merges else ()
    prepare(model)
    left, merges = model.state_dict(), StoredMerges(model, stored, plan)
    keeps = {name: _keep(plan, layers[name]) for name in left if left[name].shape != whole[name].shape}

    def pieces(name: str, dtype: torch.dtype | None) -> Iterator[Tensor]:
        if name in averaged:
            return iter([left[name] if dtype is None else left[name].to(dtype)])
        return merges.pieces(name, dtype) if name in merges else stored.pieces(name, keeps.get(name), dtype)

    return model, pieces


def prepared(checkpoint: Path, prepare: Prepare | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model in memory, in float32, read by transformers and changed by ``prepare``.

    Raises:
        UserError: see `load_model`, and what ``prepare`` refuses.
    """
    model = load_model(checkpoint, trust_remote_code=trust_remote_code)
    if prepare is not None:
        prepare(model)
    return model


def pieces_of(model: PreTrainedModel) -> Pieces:
    """The values of a model that is in memory."""
    values: Mapping[str, Tensor] = model.state_dict()

    def pieces(name: str, dtype: torch.dtype | None) -> Iterator[Tensor]:
        yield values[name] if dtype is None else values[name].to(dtype)

    return pieces


def _keep(plan: PruningPlan, layer: str) -> Sequence[int]:
    planned = plan.layer(layer)
    assert planned is not None, f"layer {layer} was narrowed, and no plan says so"
    return planned.keep
