"""Only routers learn, and what they learn is the teacher."""

import pytest
import torch

from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from pruning.apply import apply_plan
from pruning.finetuning.router_kd import distil
from tests.models_table import TINY
from tests.oracle import plan_for
from tests.pruning.finetuning.examples import columns, quick


def pruned(name, keep=(0, 2, 4, 6)):
    model = TINY[name]()
    apply_plan(model, plan_for(model, {layer.name: keep for layer in find_moe_layers(model)}, top_k=min(2, len(keep))))
    return model


def unlabelled(model):
    return {name: column for name, column in columns(model).items() if name != "labels"}


@pytest.mark.parametrize("name", TINY)
def test_routers_come_nearer_to_the_teacher_and_nothing_else_moves(name):
    model, teacher = pruned(name), TINY[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = distil(model, teacher, unlabelled(model), 1.0, quick(40, learning_rate=1e-2))
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(".router." in key or ".gate." in key for key in moved)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_no_distance_from_itself_and_padding_is_not_compared():
    model = TINY["mixtral"]()
    batch = unlabelled(model)
    batch["attention_mask"][:, 4:] = 0
    teacher = TINY["mixtral"]()
    with torch.no_grad():
        teacher.lm_head.weight += 0
    losses = distil(model, teacher, batch, 2.0, quick(1))
    assert losses == [pytest.approx(0, abs=1e-6)]


def test_models_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError) as caught:
        distil(TINY["vmoe"](), TINY["mixtral"](), {}, 1.0, quick(1))
    assert caught.value.what == "the model gives 10 logits, its teacher 128"
    assert caught.value.hint == "give the checkpoint that the model was pruned from as --teacher"


def test_routers_without_a_choice_are_refused():
    with pytest.raises(UserError) as caught:
        distil(pruned("vmoe", keep=(3,)), TINY["vmoe"](), {}, 1.0, quick(1))
    assert caught.value.what == "every layer has one expert, so the routers have nothing to choose"
    assert caught.value.hint == "recover with --method plain"
