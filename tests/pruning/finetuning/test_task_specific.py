"""Pruning while the task is learned: what is counted, who goes when, and what is left."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from pruning.apply import apply_plan
from pruning.finetuning.objectives import task_loss
from pruning.finetuning.options import TaskSpecific
from pruning.finetuning.routing import Routing, watched
from pruning.finetuning.task_specific import TaskSpecificPruning
from pruning.finetuning.training import train
from tests.models_table import EXPERTS, TINY, example_inputs
from tests.pruning.finetuning.examples import columns, quick

UNGROUPED = [name for name in TINY if name != "deepseek_v3"]


def pruned_while_learning(name, options, steps=20):
    model, pruning = TINY[name](), TaskSpecificPruning(options)
    losses = train(model, columns(model), task_loss, quick(steps), callbacks=[pruning])
    return model, pruning, losses


@pytest.mark.parametrize("name", UNGROUPED)
def test_a_layer_ends_with_one_expert_and_has_learned(name):
    model, pruning, losses = pruned_while_learning(name, TaskSpecific(), steps=40)
    plan = pruning.plan("the trained model")
    assert [(layer.num_experts, layer.top_k) for layer in find_moe_layers(model)] == [(1, 1)] * 2
    assert [(len(layer.keep), layer.top_k) for layer in plan.layers] == [(1, 1)] * 2
    for layer in plan.layers:
        assert layer.keep == (int(np.argmax(layer.scores)),)
        assert sum(layer.scores) == pytest.approx(1)
    assert (plan.model_sha256, plan.criterion, plan.options["beta"]) == ("the trained model", "task-specific", 0.5)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert model(**example_inputs(model, 2, 5, seed=1)).logits.isfinite().all()


def test_experts_go_window_by_window_and_all_but_one_at_half_time():
    _, pruning, _ = pruned_while_learning("vmoe", TaskSpecific(windows=5, beta=0.8), steps=40)
    for layer in pruning.plan("").layers:
        steps = [step for step, name, _ in pruning.drops if name == layer.name]
        left = [set(ids) for _, name, ids in pruning.drops if name == layer.name]
        assert set(steps) <= {4, 8, 12, 16, 20}
        assert len(steps) > 2
        assert all(later < earlier for earlier, later in zip([set(range(EXPERTS)), *left], left, strict=False))
        assert left[-1] == set(layer.keep)


@pytest.mark.parametrize(("variant", "step"), [("staged", 10), ("two-pass", 20)])
def test_the_other_variants_drop_once(variant, step):
    _, pruning, _ = pruned_while_learning("vmoe", TaskSpecific(variant=variant))
    assert [(at, len(left)) for at, _, left in pruning.drops] == [(step, 1)] * 2


def test_what_is_left_can_be_more_than_one():
    model, pruning, _ = pruned_while_learning("mixtral", TaskSpecific(floor=3, beta=1.0))
    assert [(layer.num_experts, layer.top_k) for layer in find_moe_layers(model)] == [(3, 2)] * 2
    assert min(len(left) for _, _, left in pruning.drops) == 3


def test_the_single_expert_is_trained_with_a_gate_of_one():
    model, pruning, gates = TINY["vmoe"](), TaskSpecificPruning(), []

    def objective(trained, batch):
        with watched(trained, lambda _, routing: gates.append(routing.gates_TK)):
            return task_loss(trained, batch)

    train(model, columns(model), objective, quick(20), callbacks=[pruning])
    assert (gates[0] < 1).all()
    assert (gates[-1] == 1).all()


@pytest.mark.parametrize(
    ("score", "scores", "left"),
    [("hit-rate", [0.5, 0.25, 0.25, 0], (0, 1, 2)), ("alpha", [0.5556, 0.2593, 0.1852, 0], (0, 1))],
)
def test_four_tokens_tell_the_scores_apart(score, scores, left, four_tokens):
    model, pruning, state = four_tokens, TaskSpecificPruning(TaskSpecific(score, windows=2, beta=0.8)), State()
    pruning.on_train_begin(None, state, None, model=model)
    model.train()
    # the router's answer: e0 (.9), e0 (.6), e1 (.7), e2 (.5)
    routing = Routing(torch.zeros(4, 4), torch.tensor([[0.9], [0.6], [0.7], [0.5]]), torch.tensor([[0], [0], [1], [2]]))
    for layer in find_moe_layers(model):
        pruning._observe(layer.name, routing)
    state.global_step = 1
    pruning.on_step_end(None, state, None)
    assert [ids for _, _, ids in pruning.drops] == [left] * 2
    state.global_step = 2
    pruning.on_step_end(None, state, None)
    pruning.on_train_end(None, state, None)
    assert [layer.keep for layer in pruning.plan("").layers] == [(0,)] * 2


class State:
    global_step, max_steps = 0, 4


@pytest.fixture
def four_tokens():
    model = TINY["vmoe"]()
    model.config.num_experts = 4
    return type(model)(model.config)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows["labels"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.rows.items()}


def test_it_is_a_callback_for_anybodys_trainer(tmp_path):
    model, pruning = TINY["qwen3_moe"](), TaskSpecificPruning(TaskSpecific(windows=2))
    arguments = TrainingArguments(
        tmp_path, max_steps=8, report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False
    )
    Trainer(model, arguments, train_dataset=Rows(columns(model)), callbacks=[pruning]).train()
    assert [layer.num_experts for layer in find_moe_layers(model)] == [1, 1]
    fresh = TINY["qwen3_moe"]()
    apply_plan(fresh, pruning.plan(""))
    assert [layer.num_experts for layer in find_moe_layers(fresh)] == [1, 1]


def test_padding_and_evaluation_are_not_counted():
    model, counted = TINY["mixtral"](), []
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with watched(model, lambda _, routing: counted.append(len(routing.ids_TK))):
        model(input_ids=torch.ones_like(mask), attention_mask=mask)
        model(input_ids=torch.ones_like(mask))
    assert counted == [5, 5, 6, 6]


def refusal(name, options, steps=20):
    with pytest.raises(UserError) as caught:
        pruned_while_learning(name, options, steps)
    return caught.value.what, caught.value.hint


def test_what_cannot_be_done_is_refused():
    assert refusal("deepseek_v3", TaskSpecific()) == (
        "layer model.layers.0.mlp routes in 2 groups, which experts that go one by one leave uneven",
        "plan with moe-edge plan, prune, and recover with --method plain",
    )
    assert refusal("vmoe", TaskSpecific(floor=9)) == (
        "--floor 9 asks for 9 experts, but layer layers.1.mlp has 8",
        "give --floor 1 to 8",
    )
    assert refusal("vmoe", TaskSpecific(), steps=8)[0] == "the first half of 8 steps cannot be divided into 5 windows"
