import inspect

import numpy as np
import pytest
import torch

from models.moe_layers import find_moe_layers
from moe_spec import Statistics
from moe_spec.statistics import merge
from pruning.collect import collect
from pruning.observe import observed
from tests.models_table import EXPERTS, TINY, TOP_K, example_inputs

KEYS = ("tokens", "gate", "output_norm", "output_norm_squared", "gated_norm")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def sums_by_hand(model, inputs):
    """Every expert on every token, and the router's own answer, one token after the other."""
    seen = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        for layer in find_moe_layers(model)
    ]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    for layer, (hidden_TH, ids_TK, gates_TK) in zip(find_moe_layers(model), seen, strict=True):
        eager = inspect.unwrap(type(layer.experts).forward)
        sums = {key: np.zeros(EXPERTS) for key in KEYS}
        for token, (ids_K, gates_K) in enumerate(zip(ids_TK.tolist(), gates_TK.tolist(), strict=True)):
            for expert, gate in zip(ids_K, gates_K, strict=True):
                row = hidden_TH[token : token + 1]
                norm = eager(layer.experts, row, torch.tensor([[expert]]), torch.ones(1, 1)).norm().item()
                terms = (1, gate, norm, norm**2, gate * norm)
                for key, term in zip(KEYS, terms, strict=True):
                    sums[key][expert] += term
        yield sums


def assert_same_sums(left, right, rtol=1e-5):
    assert [layer.token_count for layer in left] == [layer.token_count for layer in right]
    for mine, theirs in zip(left, right, strict=True):
        for key in KEYS:
            np.testing.assert_allclose(mine[key], theirs[key], rtol=rtol, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", TINY)
def test_a_model_computes_the_same_while_it_is_observed(name):
    model = TINY[name]()
    inputs = example_inputs(model, batch=3, sequence=6, seed=0)
    model.set_experts_implementation("eager")
    expected = logits(model, inputs)
    with observed(model, lambda *_: None):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_the_sums_are_those_of_the_real_router_and_experts(name):
    model = TINY[name]()
    inputs = example_inputs(model, batch=3, sequence=6, seed=0)
    layers = collect(model, [inputs])
    assert [layer.name for layer in layers] == [layer.name for layer in find_moe_layers(model)]
    for layer, expected in zip(layers, sums_by_hand(model, inputs), strict=True):
        assert layer["tokens"].sum() == TOP_K * layer.token_count
        for key in KEYS:
            assert layer[key].dtype == np.float64
            np.testing.assert_allclose(layer[key], expected[key], rtol=1e-5, err_msg=key)


def test_padding_is_not_counted():
    model = TINY["qwen3_moe"]()
    short, long = (example_inputs(model, 1, sequence, seed) for seed, sequence in enumerate((4, 9)))
    padded = {
        name: torch.cat([torch.nn.functional.pad(short[name], (0, 5)), long[name]])
        for name in ("input_ids", "attention_mask")
    }
    assert_same_sums(collect(model, [padded]), collect(model, [short, long]))


@pytest.mark.parametrize("name", ["deepseek_v3", "vmoe"])
def test_many_batches_give_what_one_gives_and_shards_add_up(name):
    model = TINY[name]()
    inputs = example_inputs(model, batch=6, sequence=5, seed=0)
    batches = [{key: value[start : start + 2] for key, value in inputs.items()} for start in (0, 2, 4)]
    whole = collect(model, [inputs])
    assert_same_sums(collect(model, batches), whole)
    first, rest = (
        Statistics("model", (data,), collect(model, part)) for data, part in (("a", batches[:1]), ("b", batches[1:]))
    )
    merged = merge(first, rest)
    assert merged.data_sha256 == ("a", "b")
    assert_same_sums(merged.layers, whole)


def test_groups_stand_in_the_statistics():
    model = TINY["deepseek_v3"]()
    layers = collect(model, [example_inputs(model, 1, 4, seed=0)])
    assert [layer.groups for layer in layers] == [layer.groups for layer in find_moe_layers(model)]


def test_the_model_is_as_before_even_after_an_error():
    model = TINY["mixtral"]()
    before = model.get_experts_implementation()

    def fail(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observed(model, fail):
        logits(model, example_inputs(model, 1, 2, seed=0))
    assert model.get_experts_implementation() == before
    logits(model, example_inputs(model, 1, 2, seed=0))
