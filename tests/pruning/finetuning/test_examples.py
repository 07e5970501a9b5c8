"""What a model trains on."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralModel

from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from pruning.finetuning.examples import is_language_model, labelled, next_tokens
from tests.models_table import TINY


def images(labels):
    pixels = np.zeros((3, 1, 12, 12), np.float64)
    return Dataset({"pixel_values": pixels}, None if labels is None else np.array(labels), "")


def test_a_classifier_gets_its_images_and_classes():
    batch = labelled(images([0, 9, 3]), TINY["vmoe"](), "train.npz")
    assert {name: column.dtype for name, column in batch.items()} == {
        "pixel_values": torch.float32,
        "labels": torch.int64,
    }
    assert batch["labels"].tolist() == [0, 9, 3]


def refusal(dataset):
    with pytest.raises(UserError) as caught:
        labelled(dataset, TINY["vmoe"](), "train.npz")
    return caught.value.what, caught.value.hint


def test_a_classifier_needs_labels():
    assert refusal(images(None)) == (
        "train.npz holds no labels, which training VMoeForImageClassification on its task needs",
        "store one integer class an example in `labels`; --method router-kd needs none",
    )


@pytest.mark.parametrize("labels", [[0, 10, 1], [0, -1, 10]])
def test_classes_that_the_model_lacks_are_refused(labels):
    assert refusal(images(labels)) == (
        f"train.npz: labels go from {min(labels)} to 10, but the model has 10 classes",
        "store classes from 0 to 9",
    )


def test_a_language_model_learns_its_own_tokens_whatever_the_labels():
    ids = np.array([[5, 6, 7], [8, 9, 4]])
    batch = labelled(Dataset({"input_ids": ids}, np.array([1, 0]), ""), TINY["mixtral"](), "train.npz")
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, 4]]


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 1]])
def test_nothing_is_learned_of_padding_or_from_it(mask):
    ids_BS, mask_BS = torch.tensor([[5, 6, 7, 8]]), torch.tensor([mask])
    expected = [ids_BS[0, at].item() if at and mask[at] and mask[at - 1] else -100 for at in range(4)]
    assert next_tokens(ids_BS, mask_BS).tolist() == [expected]


def test_the_loss_of_a_padded_batch_is_that_of_its_tokens():
    model, ids_BS = TINY["mixtral"](), torch.tensor([[5, 6, 7, 8, 0, 0]])
    mask_BS = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded = model(input_ids=ids_BS, attention_mask=mask_BS, labels=next_tokens(ids_BS, mask_BS)).loss
        plain = model(input_ids=ids_BS[:, :4], labels=ids_BS[:, :4]).loss
    torch.testing.assert_close(padded, plain)


def test_a_model_without_a_head_is_refused():
    config: Any = TINY["mixtral"]().config
    model = MixtralModel(config)
    with pytest.raises(UserError) as caught:
        is_language_model(model)
    assert caught.value.what == "MixtralModel has no head that gives logits"
    assert caught.value.hint == (
        "give a checkpoint of one of: *ForCausalLM, *ForImageClassification, *ForSequenceClassification"
    )


@pytest.mark.parametrize(
    ("ids", "mask", "found"),
    [
        ([[5], [6]], None, "2 of 2 texts no token follows another, the first is number 0"),
        (
            [[5, 6, 7]] * 3,
            [[1, 1, 0], [0, 1, 0], [1, 0, 1]],
            "2 of 3 texts no token follows another, the first is number 1",
        ),
    ],
)
def test_texts_of_which_nothing_can_be_learned_are_refused(ids, mask, found):
    feeds = {"input_ids": np.array(ids)} | ({} if mask is None else {"attention_mask": np.array(mask)})
    with pytest.raises(UserError) as caught:
        labelled(Dataset(feeds, None, ""), TINY["mixtral"](), "train.npz")
    assert (caught.value.what, caught.value.hint) == (
        f"train.npz: in {found}",
        "leave them out; to learn a next token takes two in a row that are no padding",
    )
