import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoints import load_model, save_model
from models.families import family
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import FULL, REPLACE, LayerPlan
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.prune import prune
from tests.models_table import TINY, auto_class, example_inputs
from tests.oracle import masked, plan_for, with_any_means
from tests.same_model import assert_same_model

ONNX_WAY = "prune the ONNX graph, which has no such limit: moe-edge optimize exported/ --plan plan.json"


def names(model):
    return [layer.name for layer in find_moe_layers(model)]


def some(model):
    """Three of eight experts, other ones in each layer; where there are groups, two of each."""
    grouped = find_moe_layers(model)[0].groups is not None
    keeps = [(1, 2, 5, 7), (0, 3, 4, 6)] if grouped else [(1, 4, 6), (0, 2, 7)]
    return plan_for(model, dict(zip(names(model), keeps, strict=True)))


def one(model):
    return plan_for(model, dict(zip(names(model), [(5,), (2,)], strict=True)), top_k=1)


def everyone(model):
    return plan_for(model, {name: tuple(range(8)) for name in names(model)})


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_pruned_equals_masked(model, pruned, plan):
    inputs = example_inputs(model, batch=3, sequence=6, seed=0)
    with masked(model, plan):
        expected = logits(model, inputs)
    assert expected.isfinite().all()
    torch.testing.assert_close(logits(pruned, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_a_pruned_model_is_the_model_whose_dropped_experts_cannot_be_selected(name):
    model, pruned = TINY[name](), TINY[name]()
    apply_plan(pruned, some(model))
    assert_pruned_equals_masked(model, pruned, some(model))
    inputs = example_inputs(model, batch=3, sequence=6, seed=0)
    assert (logits(model, inputs) - logits(pruned, inputs)).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in TINY if name != "deepseek_v3"])
def test_one_expert_left_is_the_model_that_can_select_only_that(name):
    model, pruned = TINY[name](), TINY[name]()
    apply_plan(pruned, one(model))
    assert_pruned_equals_masked(model, pruned, one(model))
    assert [(layer.num_experts, layer.top_k) for layer in find_moe_layers(pruned)] == [(1, 1)] * 2


@pytest.mark.parametrize("name", TINY)
def test_a_replaced_expert_gives_its_gate_times_its_mean_output(name):
    model, pruned = TINY[name](), TINY[name]()
    silent = plan_for(model, dict(zip(names(model), ((1, 4, 6), (0,)), strict=True)), router=FULL)
    layers = tuple(with_any_means(layer, model.config.hidden_size) for layer in silent.layers)
    plan = PruningPlan("", "by hand", layers)
    apply_plan(pruned, plan)
    assert_pruned_equals_masked(model, pruned, plan)
    apply_plan(silenced := TINY[name](), silent)
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    assert (logits(pruned, inputs) - logits(silenced, inputs)).abs().max() > 0.01


def test_mean_outputs_of_another_width_are_refused_before_a_layer_changes():
    model = TINY["olmoe"]()
    first, second = plan_for(model, dict.fromkeys(names(model), (1, 4, 6)), router=FULL).layers
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    before = logits(model, inputs)
    with pytest.raises(UserError) as caught:
        apply_plan(model, PruningPlan("", "by hand", (first, with_any_means(second, 3))))
    assert (caught.value.what, caught.value.hint) == (
        f"the plan has mean outputs of 3 channels for layer {second.name}, whose experts give "
        f"{model.config.hidden_size}",
        "make a plan for this model with `moe-edge plan`",
    )
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("keeps", [((1, 4, 6), (0, 2, 7)), ((5,), (2,))], ids=["3 of 8", "1 of 8"])
@pytest.mark.parametrize("name", TINY)
def test_with_a_full_router_a_dropped_expert_gives_nothing(name, keeps):
    model, pruned = TINY[name](), TINY[name]()
    plan = plan_for(model, dict(zip(names(model), keeps, strict=True)), router=FULL)
    apply_plan(pruned, plan)
    assert_pruned_equals_masked(model, pruned, plan)
    assert pruned.config.to_dict() == model.config.to_dict()


def test_one_layer_may_lose_rows_where_another_keeps_its_router_full():
    model, pruned = TINY["olmoe"](), TINY["olmoe"]()
    first, second = plan_for(model, dict.fromkeys(names(model), (1, 4, 6))).layers
    plan = PruningPlan("", "by hand", (first, dataclasses.replace(second, router=FULL)))
    apply_plan(pruned, plan)
    assert_pruned_equals_masked(model, pruned, plan)
    assert [layer.num_experts for layer in find_moe_layers(pruned)] == [3, 3]
    assert [len(layer.router.get_parameter("weight")) for layer in find_moe_layers(pruned)] == [3, 8]
    assert pruned.config.to_dict() == model.config.to_dict()


def test_behind_a_full_router_no_second_plan_is_applied():
    model = TINY["olmoe"]()
    apply_plan(model, plan_for(model, dict.fromkeys(names(model), (1, 4, 6)), router=FULL))
    with pytest.raises(UserError) as caught:
        apply_plan(model, plan_for(model, dict.fromkeys(names(model), (0, 1))))
    assert (caught.value.what, caught.value.hint) == (
        f"the router of layer {names(model)[0]} has 8 rows and leads to 3 experts: a plan that keeps it full was "
        "applied before",
        "apply one plan to the model as it was loaded",
    )


@pytest.mark.parametrize("name", TINY)
def test_keeping_every_expert_changes_nothing(name):
    model, pruned = TINY[name](), TINY[name]()
    apply_plan(pruned, everyone(model))
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    assert_same_model(pruned, model, lambda each: logits(each, inputs))
    assert pruned.config.to_dict() == model.config.to_dict()


@settings(max_examples=20)
@given(st.data())
def test_any_layers_may_keep_any_numbers(data):
    model, pruned = TINY["olmoe"](), TINY["olmoe"]()
    keeps = data.draw(
        st.dictionaries(st.sampled_from(names(model)), st.sets(st.integers(0, 7), min_size=2).map(sorted).map(tuple))
    )
    plan = plan_for(model, keeps)
    apply_plan(pruned, plan)
    assert_pruned_equals_masked(model, pruned, plan)


def test_a_config_with_one_count_changes_only_where_all_layers_agree():
    uneven, even = TINY["mixtral"](), TINY["mixtral"]()
    apply_plan(uneven, plan_for(uneven, {names(uneven)[0]: (0, 1, 2)}))
    assert uneven.config.num_local_experts == 8
    apply_plan(even, one(even))
    assert (even.config.num_local_experts, even.config.num_experts_per_tok) == (1, 1)


def test_the_auxiliary_loss_sees_the_new_counts():
    model = TINY["mixtral"]()
    apply_plan(model, some(model))
    inputs = example_inputs(model, batch=1, sequence=4, seed=0)
    assert model(**inputs, output_router_logits=True).aux_loss.isfinite()


def test_a_routing_group_that_is_emptied_vanishes():
    model, pruned = TINY["deepseek_v3"](), TINY["deepseek_v3"]()
    plan = plan_for(model, dict.fromkeys(names(model), (4, 6, 7)))
    apply_plan(pruned, plan)
    assert_pruned_equals_masked(model, pruned, plan)
    assert [layer.groups for layer in find_moe_layers(pruned)] == [Groups(1, 1)] * 2
    assert (pruned.config.n_group, pruned.config.topk_group) == (1, 1)


@pytest.mark.parametrize(("keep", "top_k", "survivors"), [((0, 1, 2, 4, 5), 2, "[3, 2]"), ((3,), 1, "[1, 0]")])
def test_groups_that_a_torch_router_cannot_have_are_refused(keep, top_k, survivors):
    model = TINY["deepseek_v3"]()
    with pytest.raises(UserError) as caught:
        apply_plan(model, plan_for(model, {"model.layers.1.mlp": keep}, top_k))
    assert caught.value.what == (
        f"layer model.layers.1.mlp keeps {survivors} experts in its 2 routing groups, "
        "but a torch router needs the same number in each, at least 2"
    )
    assert caught.value.hint == ONNX_WAY


@pytest.mark.parametrize(
    ("layer", "what", "hint"),
    [
        (
            LayerPlan("model.layers.2.mlp", 8, 2, (0, 1)),
            "the plan names layer 'model.layers.2.mlp', which the model does not have",
            "did you mean 'model.layers.1.mlp'? known: model.layers.0.mlp, model.layers.1.mlp",
        ),
        (
            LayerPlan("model.layers.0.mlp", 9, 2, (0, 8)),
            "the plan is for 9 experts in layer model.layers.0.mlp and leaves K=2, but the model has 8 there, and K=2",
            "make a plan for this model with `moe-edge plan`",
        ),
        (
            LayerPlan("model.layers.0.mlp", 8, 3, (0, 1, 2)),
            "the plan is for 8 experts in layer model.layers.0.mlp and leaves K=3, but the model has 8 there, and K=2",
            "make a plan for this model with `moe-edge plan`",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_a_layer_changes(layer, what, hint):
    model = TINY["mixtral"]()
    good = LayerPlan("model.layers.1.mlp", 8, 2, (0, 1))
    with pytest.raises(UserError) as caught:
        apply_plan(model, PruningPlan("", "by hand", (good, layer)))
    assert (caught.value.what, caught.value.hint) == (what, hint)
    assert [layer.num_experts for layer in find_moe_layers(model)] == [8, 8]


def saved(name, tmp_path, make_plan=some):
    """A checkpoint with companions, and a plan for it."""
    model, checkpoint = TINY[name](), tmp_path / name
    save_model(model, checkpoint)
    for companion in ("tokenizer.json", "vocab.txt", "preprocessor_config.json"):
        (checkpoint / companion).write_text(companion)
    (checkpoint / "pytorch_model.bin").write_bytes(b"a pickle")
    plan = PruningPlan(checkpoint_sha256(checkpoint), "by hand", make_plan(model).layers)
    plan.save(tmp_path / "plan.json")
    return checkpoint, tmp_path / "plan.json"


@pytest.mark.parametrize("name", TINY)
def test_a_pruned_checkpoint_loads_with_auto_classes(name, tmp_path, capfd):
    checkpoint, plan = saved(name, tmp_path)
    out = prune(checkpoint, plan, tmp_path / "pruned")
    assert capfd.readouterr().err == ""
    pruned = load_model(out)
    assert type(auto_class(pruned).from_pretrained(out, local_files_only=True)) is type(pruned)
    assert_pruned_equals_masked(load_model(checkpoint), pruned, PruningPlan.load(plan))
    kept = len(PruningPlan.load(plan).layers[0].keep)
    row, config = family(name), json.loads((out / "config.json").read_text())
    assert (config[row.experts_key], config[row.top_k_key]) == (kept, 2)
    files = {"config.json", "model.safetensors", "plan.json", "tokenizer.json", "vocab.txt", "preprocessor_config.json"}
    assert {path.name for path in out.iterdir()} - {"generation_config.json"} == files
    assert PruningPlan.load(out / "plan.json") == PruningPlan.load(plan)


def test_one_expert_left_is_a_checkpoint_too(tmp_path):
    checkpoint, plan = saved("qwen3_moe", tmp_path, one)
    pruned = load_model(prune(checkpoint, plan, tmp_path / "pruned"))
    assert_pruned_equals_masked(load_model(checkpoint), pruned, PruningPlan.load(plan))


def test_weights_keep_their_dtype(tmp_path):
    model, checkpoint = TINY["granitemoe"](), tmp_path / "granitemoe"
    save_model(model.bfloat16(), checkpoint)
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", some(model).layers).save(tmp_path / "plan.json")
    pruned = load_model(prune(checkpoint, tmp_path / "plan.json", tmp_path / "pruned"), dtype=None)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}


def refusal(checkpoint, plan, out):
    with pytest.raises(UserError) as caught:
        prune(checkpoint, plan, out)
    assert not out.exists() or not any(out.iterdir())
    return caught.value.what, caught.value.hint


@pytest.mark.parametrize("router", [FULL, REPLACE])
def test_a_checkpoint_cannot_hold_a_router_that_stays_as_it_is(tmp_path, router):
    def make(model):
        plan = plan_for(model, {names(model)[0]: (0, 1, 2)}, router=FULL)
        replaced = tuple(with_any_means(layer, model.config.hidden_size) for layer in plan.layers)
        return plan if router == FULL else dataclasses.replace(plan, layers=replaced)

    checkpoint, plan = saved("mixtral", tmp_path, make)
    assert refusal(checkpoint, plan, tmp_path / "out") == (
        "the plan keeps the router of layer model.layers.0.mlp full, but a checkpoint has as many experts as its "
        "router has rows",
        "export it, an ONNX graph may have fewer: moe-edge export CHECKPOINT --plan plan.json -o exported/",
    )


def test_a_full_router_selects_as_many_as_before():
    model = TINY["mixtral"]()
    with pytest.raises(UserError) as caught:
        apply_plan(model, plan_for(model, {names(model)[0]: (0, 1, 2)}, top_k=1, router=FULL))
    assert caught.value.what == (
        "the plan is for 8 experts in layer model.layers.0.mlp and leaves K=1, but the model has 8 there, and K=2"
    )


def test_a_checkpoint_cannot_hold_different_counts(tmp_path):
    checkpoint, plan = saved("mixtral", tmp_path, lambda model: plan_for(model, {names(model)[0]: (0, 1, 2)}))
    assert refusal(checkpoint, plan, tmp_path / "out") == (
        f"the plan leaves different counts in the layers of {checkpoint} (model.layers.0.mlp: 3 (K=2), "
        "model.layers.1.mlp: 8 (K=2)), but a checkpoint's config.json has one for all of them",
        ONNX_WAY,
    )


def test_a_plan_for_another_model_is_refused(tmp_path):
    _, plan = saved("mixtral", tmp_path)
    other, _ = saved("olmoe", tmp_path / "other")
    theirs, ours = PruningPlan.load(plan).model_sha256, checkpoint_sha256(other)
    what = f"the plan was made for model {theirs[:12]}, but {other} is model {ours[:12]}"
    assert refusal(other, plan, tmp_path / "out")[0] == what


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert refusal(tmp_path / "nothing", tmp_path / "nothing", out)[0] == f"{out} already exists"
