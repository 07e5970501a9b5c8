"""Dense decoders become a Mixtral: of copies it is the dense one, of branches each token gets what its experts say."""

import re
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, MistralConfig

from models.checkpoints import load_model, save_model
from models.families import DENSE
from models.moe_layers import find_moe_layers
from models.upcycle import mix, upcycle
from moe_spec.errors import UserError
from tests.models.dense import SIZES, llama
from tests.models_table import HIDDEN, TINY, WIDTH

IDS = torch.arange(3, 27).reshape(2, 12)


def mistral(seed=0, **changes) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(MistralConfig(**SIZES | changes)).eval()


DENSE_MODELS = {
    "llama": llama,
    "a tied head": lambda: llama(tie_word_embeddings=True, rms_norm_eps=1e-2),
    "wide heads": lambda: llama(head_dim=16, hidden_act="gelu"),
    "long rope": lambda: llama(
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": lambda: mistral(sliding_window=4),
}


@pytest.fixture(scope="module")
def branches(tmp_path_factory):
    """Two checkpoints that differ in everything, the first with a tokenizer."""
    directories = [tmp_path_factory.mktemp("dense") / name for name in ("one", "two")]
    for seed, directory in enumerate(directories):
        save_model(llama(seed), directory)
    (directories[0] / "tokenizer.json").write_text("{}")
    return directories


def logits(model: Any):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_copies_of_a_dense_model_are_the_dense_model(name):
    dense = DENSE_MODELS[name]()
    expected = logits(dense)
    model = mix([dense] * 4, top_k=2)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert not model.training
    assert {layer.num_experts for layer in find_moe_layers(model)} == {4}
    assert all(torch.as_tensor(layer.router.weight).std() > 0.1 for layer in find_moe_layers(model))


def test_every_dense_architecture_is_tried():
    assert {build().config.model_type for build in DENSE_MODELS.values()} == set(DENSE)


def test_experts_are_those_of_the_branches_and_the_rest_is_their_mean():
    dense = [llama(seed) for seed in range(3)]
    model = mix(dense, top_k=1)
    x_TH = torch.randn(5, HIDDEN)
    for index, layer in enumerate(find_moe_layers(model)):
        for expert, branch in enumerate(dense):
            experts: Any = layer.experts
            gate_TF, up_TF = functional.linear(x_TH, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            y_TH = functional.linear(functional.silu(gate_TF) * up_TF, experts.down_proj[expert])
            torch.testing.assert_close(y_TH, branch.model.layers[index].mlp(x_TH))
    for name in dense[0].state_dict():
        if ".mlp." not in name:
            mean = torch.stack([branch.state_dict()[name] for branch in dense]).mean(dim=0)
            torch.testing.assert_close(model.state_dict()[name], mean)
    torch.testing.assert_close(dense[0].state_dict(), llama(0).state_dict(), atol=0, rtol=0)


def test_one_branch_as_the_only_expert_is_that_branch_to_the_bit():
    dense = llama(tie_word_embeddings=True, dtype=torch.bfloat16)
    model = mix([dense], top_k=1)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(dense))


def test_what_is_written_is_loaded_with_its_tokenizer_and_drawn_by_the_seed(branches, tmp_path):
    upcycle([branches[0], branches[1], branches[0]], 2, tmp_path / "moe", seed=1)
    upcycle([branches[0]] * 2, 1, tmp_path / "other")
    dense = [llama(0), llama(1), llama(0)]
    torch.manual_seed(1)
    torch.testing.assert_close(logits(load_model(tmp_path / "moe")), logits(mix(dense, 2)))
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"
    torch.testing.assert_close(logits(load_model(tmp_path / "other")), logits(llama(0)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dense", "top_k", "message"),
    [
        (
            lambda: [llama()] * 2,
            3,
            "each token is to select 3 of 2 experts\nhint: --top-k from 1 to 2, or more checkpoints",
        ),
        (
            lambda: [llama(attention_bias=True)],
            1,
            "a Mixtral has no place for model.layers.0.self_attn.q_proj.bias\n"
            "hint: give a causal language model without biases",
        ),
        (
            lambda: [llama().model],
            1,
            "the dense model has no lm_head: it says no token\nhint: give a causal language model without biases",
        ),
        (
            lambda: [llama(), llama(intermediate_size=40)],
            1,
            f"model.layers.0.mlp.down_proj.weight is [{HIDDEN}, {WIDTH}] in checkpoint 0 and [{HIDDEN}, 40] in "
            "checkpoint 1\nhint: give checkpoints of one shape: branches of the same model",
        ),
        (
            lambda: [llama(), llama(num_hidden_layers=1)],
            1,
            f"model.layers.1.input_layernorm.weight is [{HIDDEN}] in checkpoint 0 and None in checkpoint 1\n"
            "hint: give checkpoints of one shape: branches of the same model",
        ),
        (
            lambda: [llama(), llama(), llama(num_attention_heads=8, num_key_value_heads=4, head_dim=HIDDEN // 8)],
            1,
            "num_attention_heads is 4 in checkpoint 0 and 8 in checkpoint 2\nhint: give branches of the same model, or "
            "the same config.json to all",
        ),
        (
            lambda: [llama(), llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})],
            1,
            "rope_parameters is {'rope_type': 'default', 'rope_theta': 777.0} in checkpoint 0 and "
            "{'rope_type': 'default', 'rope_theta': 500000.0} in checkpoint 1\nhint: give branches of the same "
            "model, or the same config.json to all",
        ),
        (
            lambda: [mistral(sliding_window=4), mistral(sliding_window=None)],
            1,
            "sliding_window is 4 in checkpoint 0 and None in checkpoint 1\nhint: give branches of the same model, or "
            "the same config.json to all",
        ),
        (
            lambda: [TINY["mixtral"]()],
            1,
            "the mixtral model cannot become a Mixtral, whose layers are others\n"
            "hint: give a dense decoder of model_type llama or mistral",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(dense, top_k, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        mix(dense(), top_k)
