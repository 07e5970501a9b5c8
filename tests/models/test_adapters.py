"""What adapters put in the place of a family's MoE blocks, against transformers' own blocks with the same weights."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    DynamicCache,
    Step3p7TextConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from models.adapters import ADAPTERS, adapted, step3p7
from models.checkpoints import load_model, load_skeleton, save_model, stored_tensors
from models.moe_block import StackedExperts, TopKRouter
from models.moe_layers import find_moe_layers
from models.stored_names import parameter_names
from models.stored_parameters import StoredParameters
from moe_spec.errors import UserError
from pruning.stored_weights import StoredWeights
from tests.families.configs import tiny
from tests.models_table import EXPERTS, HIDDEN, TOP_K, WIDTH, example_inputs
from tests.same_model import assert_same_model

OTHER_BLOCKS = sorted({*ADAPTERS} - {"nemotron_h"})  # whose MoE blocks are standard ones
every_family = pytest.mark.parametrize("name", OTHER_BLOCKS)


def outputs(model):
    with torch.no_grad():
        return model(**example_inputs(model, batch=3, sequence=7, seed=0))[0]


@every_family
def test_an_adapted_model_computes_what_transformers_own_does(name, tmp_path):
    model = tiny(name)
    save_model(model, tmp_path)
    own_class: Any = type(model)
    own, report = own_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    for layer in find_moe_layers(model):
        assert not isinstance(getattr(own.get_submodule(layer.name), "experts", None), StackedExperts)
    torch.testing.assert_close(outputs(model), outputs(own.eval()), rtol=0, atol=1e-5)
    assert_same_model(load_model(tmp_path), model, outputs)


@every_family
def test_every_experts_implementation_gives_the_same(name):
    model = tiny(name)
    expected = outputs(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", sorted({*ADAPTERS} - {"nemotron_h", "step3p7"})
)  # a tensor of its vision tower fills three
def test_every_parameter_is_read_from_the_files_of_transformers_own(name, tmp_path):
    model = tiny(name)
    save_model(model, tmp_path)
    stored = StoredParameters(tmp_path, torch.float32)
    names = parameter_names(load_skeleton(tmp_path), stored_tensors(tmp_path), tmp_path)
    assert set(names.values()) <= set(stored)
    for parameter, value in model.state_dict().items():
        torch.testing.assert_close(stored[parameter], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dbrx", "switch_transformers"])
def test_experts_are_ranked_as_they_lie_in_the_files(name, tmp_path):
    model = tiny(name)
    save_model(model, tmp_path)
    weights = StoredWeights(tmp_path)
    for stored, layer in zip(weights.layers, find_moe_layers(model), strict=True):
        np.testing.assert_array_equal(weights.router(stored), layer.router.get_parameter("weight").detach().double())
        sums = np.zeros(EXPERTS)
        for expert, piece in weights.experts(stored):
            sums[expert] += np.square(piece).sum()
        expected = sum(matrix.detach().double().square().sum(dim=(1, 2)) for matrix in layer.experts.parameters())
        np.testing.assert_allclose(sums, expected)


def test_transformers_is_as_before_afterwards():
    config = DbrxConfig(**tiny("dbrx").config.to_dict())
    with adapted("dbrx"):
        assert get_checkpoint_conversion_mapping("dbrx")
    assert get_checkpoint_conversion_mapping("dbrx") is None
    own: Any = DbrxForCausalLM(config)
    assert type(own.transformer.blocks[0].ffn).__name__ == "DbrxFFN"
    assert not own._can_set_experts_implementation()


def test_a_norm_that_is_no_sum_is_refused():
    config = tiny("dbrx").config.to_dict()
    config["ffn_config"]["moe_normalize_expert_weights"] = 2.0
    message = (
        "the config's moe_normalize_expert_weights is 2.0, but only 1, the sum, and null are known\n"
        "hint: DBRX's published checkpoints have 1"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"), adapted("dbrx"):
        DbrxForCausalLM(DbrxConfig(**config))


def test_a_router_with_a_bias_is_refused():
    config = tiny("switch_transformers").config.to_dict() | {"router_bias": True}
    message = (
        "the config's router_bias is true, but routers without a bias are known only\n"
        "hint: the published Switch Transformers have none"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"), adapted("switch_transformers"):
        SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**config))


def test_experts_with_a_limit_clamp_as_transformers_own_do():
    config = Step3p7TextConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS)
    own = Step3p7Experts(config, swiglu_limit=0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in own.parameters():
        parameter.data.normal_(generator=generator)
    hidden_TH = torch.randn(5, HIDDEN, generator=generator)
    ids_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in hidden_TH])
    gates_TK = torch.rand(5, TOP_K, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            step3p7.adapt(own)(hidden_TH, ids_TK, gates_TK), own(hidden_TH, ids_TK, gates_TK), rtol=1e-5, atol=1e-5
        )
        own.limit = float("inf")
        assert type(step3p7.adapt(own)) is StackedExperts


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_router_takes_the_best_and_weighs_them_by_their_scores(score, renormalize):
    weight_EH, bias_E = torch.eye(3), torch.tensor([0.0, 1.0, -4.0])
    router = TopKRouter(weight_EH, 2, bias_E=bias_E, score=score, renormalize=renormalize)
    logits_TE, gates_TK, ids_TK = router(torch.tensor([[0.5, 0.0, 0.0]]))
    scores_E = torch.softmax(logits_TE[0], dim=-1) if score == "softmax" else torch.sigmoid(logits_TE[0])
    assert logits_TE.tolist() == [[0.5, 1.0, -4.0]]
    assert ids_TK.tolist() == [[1, 0]]
    expected_K = scores_E[[1, 0]]
    expected_K = expected_K / expected_K.sum() if renormalize else expected_K
    torch.testing.assert_close(gates_TK[0], expected_K)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_stacked_experts_add_what_each_gives_times_its_gate(gated, transposed):
    generator = torch.Generator().manual_seed(0)
    columns = 2 * WIDTH if gated else WIDTH
    up_ENH, down_EHF, up_bias_EN, down_bias_EH = (
        torch.randn(EXPERTS, *shape, generator=generator)
        for shape in ((columns, HIDDEN), (HIDDEN, WIDTH), (columns,), (HIDDEN,))
    )
    kernels = (up_ENH.mT, down_EHF.mT) if transposed else (up_ENH, down_EHF)
    act = torch.nn.functional.relu
    experts = StackedExperts(
        *kernels, act, up_bias_EN=up_bias_EN, down_bias_EH=down_bias_EH, gated=gated, transposed=transposed
    )
    x_H = torch.randn(HIDDEN, generator=generator)
    expected_H = torch.zeros(HIDDEN)
    for expert, gate in ((5, 0.25), (2, 2.0)):
        middle = up_ENH[expert] @ x_H + up_bias_EN[expert]
        middle = act(middle[:WIDTH]) * middle[WIDTH:] if gated else act(middle)
        expected_H += gate * (down_EHF[expert] @ middle + down_bias_EH[expert])
    with torch.no_grad():
        got_1H = experts(x_H[None], torch.tensor([[5, 2]]), torch.tensor([[0.25, 2.0]]))
    torch.testing.assert_close(got_1H[0], expected_H, rtol=1e-4, atol=1e-4)


def test_time_steps_of_nemotron_h_are_the_same_for_one_token_as_for_many():
    """transformers' own raises those of many tokens; the smallest here are a thousandth of what it raises them to."""
    model = tiny("nemotron_h")
    ids = example_inputs(model, batch=2, sequence=4, seed=0)["input_ids"]
    for mixer in (layer.mixer for layer in model.model.layers if layer.block_type == "linear_attention"):
        mixer.dt_bias.data -= 7.0
        assert mixer.time_step_limit == (0.0, float("inf"))
    with torch.no_grad():
        at_once = model(ids, use_cache=False).logits
        cache, steps = DynamicCache(config=model.config), []
        for token in ids.split(1, dim=1):
            steps.append(model(token, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once, rtol=0, atol=1e-5)
