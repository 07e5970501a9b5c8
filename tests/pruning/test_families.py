"""Families whose routers are kept, told or answered in a way of their own; benchmarks/families.py does this for all."""

import re

import numpy as np
import pytest
import torch

from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import MEAN, REPLACE, LayerPlan, Merge
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.collect import collect
from pruning.finetuning.mask import ExpertMask
from pruning.prune import prune
from pruning.reconstruction import search_model
from tests.families.configs import tiny
from tests.models_table import EXPERTS, TOP_K, example_inputs
from tests.oracle import masked, plan_for

PECULIAR = {
    "afmoe": "the block holds the selection bias, and the router a Linear",
    "dbrx": "all experts in one matrix of the files; counts in a part of the config",
    "deepseek_v4": "the square root of a softplus; a final norm whose name transformers takes back",
    "ernie4_5_moe": "a selection bias of one row",
    "gemma4": "probabilities for logits, a scale an expert, and K in a config that all layers share",
    "hunyuan_v1_moe": "a Linear called wg",
    "lfm2_moe": "the block holds the selection bias",
    "llama4": "gates multiply what experts read",
    "muse_spark": "a norm after each expert",
    "openai_privacy_filter": "the block multiplies by K",
    "phimoe": "sparsemixer",
    "qwen3_vl_moe": "a language model within another",
}
peculiar = pytest.mark.parametrize("name", PECULIAR)


def keeping(model, keep, **options):
    return plan_for(model, {layer.name: keep for layer in find_moe_layers(model)}, **options)


def outputs(model):
    with torch.no_grad():
        return model(**example_inputs(model, batch=3, sequence=6, seed=0))[0]


CUT = {
    "ernie4_5_vl_moe": "one list of the experts for words and of those for images",
    "step3p7": "queries, keys and values of its vision tower are one tensor",
}
"""What the loader makes several parameters of."""


@pytest.mark.parametrize("name", [*PECULIAR, *CUT])
def test_a_pruned_checkpoint_is_the_model_whose_dropped_experts_cannot_be_selected(tmp_path, name):
    model = tiny(name)
    save_model(model, tmp_path / "checkpoint")
    layers = keeping(model, (0, 2, 5, 7)).layers
    plan = PruningPlan(checkpoint_sha256(tmp_path / "checkpoint"), "by hand", layers)
    plan.save(tmp_path / "plan.json")
    prune(tmp_path / "checkpoint", tmp_path / "plan.json", tmp_path / "pruned")
    pruned = load_model(tmp_path / "pruned")
    with masked(model, plan):
        expected = outputs(model)
    assert expected.isfinite().all()
    torch.testing.assert_close(outputs(pruned), expected, rtol=0, atol=1e-5)
    assert (outputs(model) - expected).abs().max() > 1e-3


@peculiar
def test_every_token_is_counted_for_each_expert_that_it_selects(name):
    model = tiny(name)
    before = outputs(model)
    for layer in collect(model, [example_inputs(model, batch=3, sequence=7, seed=0)]):
        assert layer["tokens"].sum() == 21 * TOP_K
        assert (layer.token_count, layer.experts, layer.top_k) == (21, EXPERTS, TOP_K)
        assert (layer["probability"] > 0).all()
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


@peculiar
def test_a_mask_makes_the_same_experts_unselectable(name):
    model = tiny(name)
    plan, mask, before = keeping(model, (0, 2, 5, 7)), ExpertMask(model), outputs(model)
    for layer in plan.layers:
        mask.keep(layer.name, layer.keep)
    with mask.applied():
        got = outputs(model)
    with masked(model, plan):
        torch.testing.assert_close(got, outputs(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["afmoe", "ernie4_5_moe", "gemma4", "lfm2_moe", "minimax_m2", "phimoe"])
def test_the_best_subset_is_searched_for(name):
    model = tiny(name)
    layers = find_moe_layers(model)
    found = search_model(model, [example_inputs(model, batch=3, sequence=7, seed=0)], [EXPERTS - 1] * len(layers))
    for one in found:
        assert one.exact
        (dropped,) = set(range(EXPERTS)) - set(one.keep)
        assert one.scores[dropped] == min(one.scores)
        assert one.loss == min(one.scores) < max(one.scores)


def test_probabilities_are_counted_as_they_are():
    for layer in collect(tiny("gemma4"), [example_inputs(tiny("gemma4"), batch=3, sequence=7, seed=0)]):
        np.testing.assert_allclose(layer["probability"].sum(), 21, rtol=1e-6)


@pytest.mark.parametrize("name", ["gemma4", "openai_privacy_filter"])
def test_one_expert_left_is_the_model_that_can_select_only_that(name):
    model, pruned = tiny(name), tiny(name)
    plan = keeping(model, (5,), top_k=1)
    apply_plan(pruned, plan)
    with masked(model, plan):  # the second expert that is selected has the weight 0
        expected = outputs(model)
    torch.testing.assert_close(outputs(pruned), expected, rtol=0, atol=1e-5)


def test_rows_of_a_merged_router_are_means_wherever_they_lie():
    model, merged = tiny("ernie4_5_moe"), tiny("ernie4_5_moe")
    keep, pair = (0, 2), Merge((0, 1), (1.0, 3.0))
    rest = Merge(tuple(range(2, EXPERTS)), (1.0,) * (EXPERTS - 2))
    layers = [
        LayerPlan(layer.name, EXPERTS, TOP_K, keep, router=MEAN, merge=(pair, rest)) for layer in find_moe_layers(model)
    ]
    apply_plan(merged, PruningPlan("", "by hand", tuple(layers)))
    for layer in find_moe_layers(model):
        name = f"{layer.name}.gate.moe_statics.e_score_correction_bias"
        bias_1E = model.state_dict()[name]
        expected = torch.stack([(bias_1E[0, 0] + 3 * bias_1E[0, 1]) / 4, bias_1E[0, 2:].mean()])
        torch.testing.assert_close(merged.state_dict()[name], expected[None])


def test_a_layer_that_chooses_by_token_id_is_not_pruned():
    model = tiny("deepseek_v4")
    plan = keeping(model, (0, 2, 5, 7))
    first = find_moe_layers(model)[0]
    del first.router.e_score_correction_bias
    message = (
        "the DeepseekV4TopKRouter of layer model.layers.0.mlp has no 'gate.e_score_correction_bias', so it does not "
        "choose experts as deepseek_v4 does elsewhere\nhint: leave the layer out of the plan; fine-tune with --method "
        "plain or router-kd"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        apply_plan(model, plan)


def test_a_switch_counts_what_encoder_and_decoder_choose_and_drops_what_overflows(tmp_path):
    model = tiny("switch_transformers")
    inputs = example_inputs(model, batch=3, sequence=7, seed=0)
    inputs["attention_mask"][0, 4:] = 0
    encoder, decoder = collect(model, [inputs])
    assert (encoder["tokens"].sum(), encoder.token_count) == (18, 18)
    assert (decoder["tokens"].sum(), decoder.token_count) == (12, 12)
    assert encoder["gate"].sum() < encoder["probability"].sum()
    gates_T1 = find_moe_layers(model)[0].router(torch.ones(2, 5, 32))[1]
    assert ((gates_T1 > 0).view(2, 5) == torch.tensor([True, True, False, False, False])).all()


def test_a_gated_input_gives_no_mean_output_and_no_search():
    model = tiny("llama4")
    reason = (
        "in layer model.layers.0.feed_forward gates multiply what experts read instead of what they give, so {}\n"
        "hint: drop experts with their rows of the router: --router rows, by a criterion of statistics"
    )
    with pytest.raises(UserError, match=f"^{re.escape(reason.format('subsets cannot be told by outputs'))}$"):
        search_model(model, [example_inputs(model, batch=1, sequence=3, seed=0)], [7, 7])
    first = LayerPlan("model.layers.0.feed_forward", EXPERTS, TOP_K, (0, 1, 2), router=REPLACE)
    message = re.escape(reason.format("no mean output takes an expert's place"))
    with pytest.raises(UserError, match=f"^{message}$"):
        apply_plan(model, PruningPlan("", "by hand", (first,)))


def test_experts_of_mlps_are_not_pruned_from_a_checkpoint_whose_attention_has_as_many(tmp_path):
    model, checkpoint = tiny("jetmoe"), tmp_path / "checkpoint"
    save_model(model, checkpoint)
    layers = keeping(model, (0, 2, 5, 7)).layers
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", layers).save(tmp_path / "plan.json")
    message = (
        f"the attention of jetmoe has as many experts as its MLPs, and the config.json of {checkpoint} one count for "
        "both\nhint: plan for the MLPs, and export with the plan: moe-edge export CHECKPOINT --plan plan.json"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        prune(checkpoint, tmp_path / "plan.json", tmp_path / "pruned")
    apply_plan(model, keeping(model, (0, 2, 5, 7)))
    assert model.config.num_local_experts == EXPERTS
    assert outputs(model).isfinite().all()
