"""BERT with experts: a copy of the dense layer each, it is the dense model; what else its configuration promises."""

import re
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional
from transformers import BertConfig, BertModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from models.checkpoints import load_model, save_model
from models.moe_bert.configuration import MoeBertConfig
from models.moe_bert.modeling import MoeBertForSequenceClassification, mean_of_tokens
from models.moe_bert.upcycle import upcycle
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from tests.models_table import TINY, example_inputs

CLASSES = ("one", "two", "three")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BertConfig(vocab_size=128, max_position_embeddings=32, initializer_range=0.2, **sizes)
    return BertModel(config).eval()


def padded(model):
    inputs = example_inputs(model, 3, 7, seed=2)
    inputs["attention_mask"][0, 4:] = 0
    return inputs


def test_an_upcycled_model_is_the_dense_one(dense):
    model = upcycle(dense, CLASSES, moe_layers=[1, 3])
    inputs = padded(model)
    with torch.no_grad():
        hidden_BSH = dense(**inputs).last_hidden_state
        expected = model.classifier(mean_of_tokens(hidden_BSH, inputs["attention_mask"]))
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert [layer.name for layer in find_moe_layers(model)] == [
        "bert.encoder.layer.1.intermediate",
        "bert.encoder.layer.3.intermediate",
    ]
    assert model.config.id2label == {0: "one", 1: "two", 2: "three"}
    assert not model.training


def test_the_lower_layers_alone_can_be_taken(dense):
    model = upcycle(dense, CLASSES, num_hidden_layers=2, moe_layers=[1], num_experts=3, num_experts_per_tok=1)
    inputs = padded(model)
    with torch.no_grad():
        expected = dense(**inputs, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(model.bert(**inputs).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_layers_that_the_dense_model_lacks_are_not_made_up(dense):
    message = "5 layers are asked for, and the dense BERT has 4\nhint: num_hidden_layers of at most 4"
    with pytest.raises(UserError, match=f"^{message}$"):
        upcycle(dense, CLASSES, num_hidden_layers=5, moe_layers=[4])


def test_what_is_saved_is_loaded(dense, tmp_path):
    model = upcycle(dense, CLASSES, moe_layers=(1, 3))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert isinstance(loaded, MoeBertForSequenceClassification)
    assert loaded.config.moe_layers == [1, 3]
    inputs = padded(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_padding_does_not_change_a_text():
    model = TINY["moe_bert"]()
    inputs = example_inputs(model, 2, 5, seed=0)
    longer = {name: functional.pad(tensor, (0, 3)) for name, tensor in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**longer).logits, model(**inputs).logits)
        torch.testing.assert_close(model(inputs["input_ids"]).logits, model(**inputs).logits)


def test_each_layer_is_balanced_for_itself_and_only_in_training():
    model, logits = TINY["moe_bert"](), []
    inputs, labels = example_inputs(model, 4, 5, seed=0), torch.tensor([0, 1, 2, 3])
    quiet = model(**inputs, labels=labels)
    assert quiet.aux_loss is None
    torch.testing.assert_close(quiet.loss, functional.cross_entropy(quiet.logits, labels))
    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(lambda *call: logits.append(call[-1][0]))
    noisy = model.train()(**inputs, labels=labels)
    expected = sum(load_balancing_loss_func((logits_TE,), 8, 2) for logits_TE in logits)
    torch.testing.assert_close(noisy.aux_loss, expected)
    entropy = functional.cross_entropy(noisy.logits, labels)
    torch.testing.assert_close(noisy.loss, entropy + 0.01 * noisy.aux_loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "the router selects 3 of 2 experts"),
        ({"num_hidden_layers": 4}, "experts are in layers [5], but there are 4 layers"),
    ],
)
def test_impossible_sizes_are_refused(changes, message, tmp_path):
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(message)):
        MoeBertConfig(**changes).save_pretrained(tmp_path)
