"""Task data as a model trains on it: its inputs, and labels where the loss needs them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_spec.dataset import LABELS, MASK, Dataset
from moe_spec.errors import UserError
from pruning.inputs import check_inputs, tensors_of

IGNORED = -100
"""The label of a token that no loss is taken of: transformers' convention."""

LANGUAGE_MODEL, CLASSIFIERS = "ForCausalLM", ("ForImageClassification", "ForSequenceClassification")

Inputs = Mapping[str, Tensor]
"""Arguments of a model by name, each with examples on axis 0."""


def inputs(dataset: Dataset, model: PreTrainedModel, where: str) -> Inputs:
    """The model's inputs: ids and masks as int64, everything else as float32.

    Raises:
        UserError: the data does not fit the model; ``where`` names its file.
    """
    check_inputs(dataset.feeds, model, where)
    return tensors_of(dataset.feeds, torch.float32)


def labelled(dataset: Dataset, model: PreTrainedModel, where: str) -> Inputs:
    """Inputs and labels.

    The labels of a language model are its own tokens, whatever ``labels`` the file holds; padding is not learned.

    Raises:
        UserError: the data does not fit the model, has no labels, or classes that the model does not have; or there is
            nothing to learn of a text.
    """
    batch = inputs(dataset, model, where)
    if is_language_model(model):
        labels_BS = next_tokens(batch["input_ids"], batch.get(MASK))
        _require_learned(labels_BS, where)
        return {**batch, LABELS: labels_BS}
    if dataset.labels is None:
        raise UserError(
            f"{where} holds no labels, which training {type(model).__name__} on its task needs",
            hint="store one integer class an example in `labels`; --method router-kd needs none",
        )
    config: Any = model.config
    low, high, classes = dataset.labels.min(), dataset.labels.max(), config.num_labels
    if low < 0 or high >= classes:
        raise UserError(
            f"{where}: labels go from {low} to {high}, but the model has {classes} classes",
            hint=f"store classes from 0 to {classes - 1}",
        )
    return {**batch, LABELS: torch.from_numpy(dataset.labels)}


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether the model's logits are those of a next token; else they are those of a class.

    Raises:
        UserError: the model has no head that gives logits.
    """
    name = type(model).__name__
    if not name.endswith((LANGUAGE_MODEL, *CLASSIFIERS)):
        known = ", ".join(f"*{suffix}" for suffix in (LANGUAGE_MODEL, *CLASSIFIERS))
        raise UserError(f"{name} has no head that gives logits", hint=f"give a checkpoint of one of: {known}")
    return name.endswith(LANGUAGE_MODEL)


def next_tokens(ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Labels (B, S) for a model that compares its token ``s`` with label ``s + 1``, as transformers' do.

    A token has a label where it and the one before it are no padding, on whichever side the padding lies.

    >>> next_tokens(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]]))
    tensor([[-100,    6,    7, -100]])
    """
    labels_BS = torch.full_like(ids_BS, IGNORED)
    real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS != 0
    learned_BS = real_BS[:, 1:] & real_BS[:, :-1]
    labels_BS[:, 1:] = torch.where(learned_BS, ids_BS[:, 1:], IGNORED)
    return labels_BS


def _require_learned(labels_BS: Tensor, where: str) -> None:
    """Refuse texts without a label: the loss of a batch of such texts only is no number."""
    empty = (labels_BS == IGNORED).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise UserError(
            f"{where}: in {len(empty)} of {len(labels_BS)} texts no token follows another, the first is number "
            f"{empty[0]}",
            hint="leave them out; to learn a next token takes two in a row that are no padding",
        )
