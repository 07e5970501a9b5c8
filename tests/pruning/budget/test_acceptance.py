import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from pruning.apply import apply_plan
from pruning.budget import acceptance as module
from pruning.budget.acceptance import Acceptance, acceptance
from tests.models_table import TINY, example_inputs
from tests.oracle import plan_for


@given(st.lists(st.lists(st.floats(-20, 20), min_size=5, max_size=5), min_size=2, max_size=2))
def test_it_is_one_minus_the_total_variation(logits):
    p_NV, q_NV = torch.tensor(logits, dtype=torch.float64).softmax(dim=-1)[:, None]
    expected = 1 - 0.5 * (p_NV - q_NV).abs().sum(dim=-1)
    torch.testing.assert_close(acceptance(p_NV, q_NV), expected)


def said(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.softmax(dim=-1)


@pytest.mark.parametrize("name", TINY)
def test_a_masked_model_is_accepted_as_the_pruned_one_would_be(name):
    model, pruned = TINY[name](), TINY[name]()
    inputs = example_inputs(model, batch=4, sequence=6, seed=0)
    halves = [{key: value[part] for key, value in inputs.items()} for part in (slice(0, 3), slice(3, 4))]
    keep = {layer.name: (1, 2, 4, 6) for layer in find_moe_layers(model)}
    plan = plan_for(pruned, keep)
    expected = said(model, inputs)
    fitness = Acceptance(model, lambda: iter(halves))
    apply_plan(pruned, plan)
    assert fitness(plan.layers) == pytest.approx(float(acceptance(expected, said(pruned, inputs)).mean()), abs=1e-5)
    everything = plan_for(model, {layer: tuple(range(8)) for layer in keep})
    assert fitness(everything.layers) == pytest.approx(1.0, abs=1e-6)
    assert fitness(plan.layers) < 0.99


def test_padding_does_not_count():
    model = TINY["mixtral"]()
    inputs = example_inputs(model, batch=2, sequence=6, seed=0)
    inputs["attention_mask"][:, 4:] = 0
    short = {key: value[:, :4] for key, value in inputs.items()}
    plans = plan_for(model, {layer.name: (0, 3, 5) for layer in find_moe_layers(model)}).layers
    padded = Acceptance(model, lambda: iter([inputs]))(plans)
    assert padded == pytest.approx(Acceptance(model, lambda: iter([short]))(plans), abs=1e-6)


def test_more_than_fits_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 2 * 6 * 128 * 4)
    model = TINY["mixtral"]()
    batch = example_inputs(model, batch=2, sequence=6, seed=0)
    with pytest.raises(UserError) as caught:
        Acceptance(model, lambda: iter([batch, batch]))
    assert caught.value.what == (
        "the first 2 batches have distributions of 12,288 bytes, which a search keeps, at most 6,144"
    )
    assert caught.value.hint == "look at fewer examples: --limit"
