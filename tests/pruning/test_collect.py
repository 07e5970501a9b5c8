import dataclasses
import inspect

import numpy as np
import pytest
import torch

from models.moe_layers import MoELayer, find_moe_layers
from moe_spec.errors import UserError
from moe_spec.statistics import KEYS, Statistics, merge
from pruning.collect import LayerSums, collect
from pruning.observe import Run, Seen, observed
from tests.models_table import EXPERTS, HIDDEN, TINY, TOP_K, example_inputs

SPARSE = [name for name, key in KEYS.items() if not key.dense]
SIGMOID = ("deepseek_v3",)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def cosine(left_H, right_H):
    return left_H @ right_H / (np.linalg.norm(left_H) * np.linalg.norm(right_H))


def score(name, logits_E):
    if name in SIGMOID:
        return 1 / (1 + np.exp(-logits_E))
    exponential_E = np.exp(logits_E - logits_E.max())
    return exponential_E / exponential_E.sum()


def sums_by_hand(name, model, inputs):
    """Every expert on every token, and the router's own answer, one token after the other."""
    seen = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        for layer in find_moe_layers(model)
    ]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    valid_T = inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else slice(None)
    for layer, arguments in zip(find_moe_layers(model), seen, strict=True):
        sums = {key: np.zeros([{"E": EXPERTS, "H": HIDDEN}[axis] for axis in row.axes]) for key, row in KEYS.items()}
        for hidden_H, ids_K, gates_K in zip(*(values[valid_T] for values in arguments), strict=True):
            add_token(sums, name, layer, hidden_H, dict(zip(ids_K.tolist(), gates_K.tolist(), strict=True)))
        yield sums


def add_token(sums, name, layer, hidden_H, gates):
    outputs_EH = [expert(layer, hidden_H, e) for e in range(EXPERTS)]
    router = {key: value.numpy().astype(np.float64) for key, value in layer.router.state_dict().items()}
    h = hidden_H.numpy().astype(np.float64)
    z = router["weight"] @ h + router.get("bias", 0)
    y = sum(gate * outputs_EH[e] for e, gate in gates.items())
    sums["probability"] += score(name, z)
    sums["logit_gram"] += np.outer(z, z)
    sums["output_of_all"] += outputs_EH
    sums["output_cosine"] += [[cosine(left, right) for right in outputs_EH] for left in outputs_EH]
    for e, gate in gates.items():
        f = outputs_EH[e]
        norm = np.linalg.norm(f)
        sums["tokens"][e] += 1
        sums["gate"][e] += gate
        sums["gate_squared"][e] += gate**2
        sums["output_norm"][e] += norm
        sums["output_norm_squared"][e] += norm**2
        sums["gated_norm"][e] += gate * norm
        sums["gated_norm_squared"][e] += (gate * norm) ** 2
        sums["gated_norm_change"][e] += gate * norm * max(0, 1 - cosine(h, h + y))
        sums["output_peak"][e] = max(sums["output_peak"][e], abs(f).max())
        sums["output"][e] += f
        sums["output_squared"][e] += f**2


def expert(layer, hidden_H, e):
    eager = inspect.unwrap(type(layer.experts).forward)
    with torch.no_grad():
        output_1H = eager(layer.experts, hidden_H[None], torch.tensor([[e]]), torch.ones(1, 1))
    return output_1H[0].numpy().astype(np.float64)


def assert_close(actual, expected, rtol, key):
    """Within ``rtol`` of the largest: elements of a matrix may be sums that cancel."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max(), err_msg=key)


def assert_same_sums(left, right, rtol=1e-5):
    assert [layer.token_count for layer in left] == [layer.token_count for layer in right]
    for mine, theirs in zip(left, right, strict=True):
        assert sorted(mine.sums) == sorted(theirs.sums)
        for key in mine.sums:
            assert_close(mine[key], theirs[key], rtol, key)


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
    layers = collect(model, [inputs], dense=True)
    assert [layer.name for layer in layers] == [layer.name for layer in find_moe_layers(model)]
    for layer, expected in zip(layers, sums_by_hand(name, model, inputs), strict=True):
        assert layer["tokens"].sum() == TOP_K * layer.token_count
        assert list(layer.sums) == list(KEYS)
        for key in KEYS:
            assert layer[key].dtype == np.float64
            assert_close(layer[key], expected[key], 1e-5, key)


def test_a_selection_bias_is_no_part_of_logits_and_scores():
    model = TINY["deepseek_v3"]()
    inputs = example_inputs(model, batch=2, sequence=6, seed=0)
    before = collect(model, [inputs])[0]
    find_moe_layers(model)[0].router.get_buffer("e_score_correction_bias").add_(10 * torch.arange(EXPERTS))
    after = collect(model, [inputs])[0]
    assert before["tokens"].tolist() != after["tokens"].tolist()
    for key in ("probability", "logit_gram"):
        assert_close(after[key], before[key], 0, key)


def test_the_dense_statistics_are_taken_only_when_asked_for():
    model = TINY["mixtral"]()
    inputs = example_inputs(model, batch=1, sequence=4, seed=0)
    sparse, dense = collect(model, [inputs])[0], collect(model, [inputs], dense=True)[0]
    assert list(sparse.sums) == SPARSE
    assert_same_sums([sparse], [dataclasses.replace(dense, sums={key: dense[key] for key in SPARSE})], rtol=0)
    np.testing.assert_allclose(np.diag(dense["output_cosine"]), 4)
    with pytest.raises(UserError) as caught:
        sparse["output_cosine"]
    assert caught.value.hint == "moe-edge calibrate --dense"


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_padding_is_not_counted(name):
    model = TINY[name]()
    short, long = (example_inputs(model, 1, sequence, seed) for seed, sequence in enumerate((4, 9)))
    padded = {
        key: torch.cat([torch.nn.functional.pad(short[key], (0, 5)), long[key]])
        for key in ("input_ids", "attention_mask")
    }
    assert_same_sums(collect(model, [padded], dense=True), collect(model, [short, long], dense=True))


@pytest.mark.parametrize("name", ["deepseek_v3", "vmoe"])
def test_many_batches_give_what_one_gives_and_shards_add_up(name):
    model = TINY[name]()
    inputs = example_inputs(model, batch=6, sequence=5, seed=0)
    batches = [{key: value[start : start + 2] for key, value in inputs.items()} for start in (0, 2, 4)]
    whole = collect(model, [inputs], dense=True)
    assert_same_sums(collect(model, batches, dense=True), whole)
    first, rest = (
        Statistics("model", (data,), collect(model, part, dense=True))
        for data, part in (("a", batches[:1]), ("b", batches[1:]))
    )
    merged = merge(first, rest)
    assert merged.data_sha256 == ("a", "b")
    assert_same_sums(merged.layers, whole)


def test_the_dense_statistics_do_not_depend_on_how_many_tokens_go_at_a_time(monkeypatch):
    model = TINY["granitemoe"]()
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    whole = collect(model, [inputs], dense=True)
    monkeypatch.setattr("pruning.collect._DENSE_ELEMENTS", 1)  # less than a token
    assert_same_sums(collect(model, [inputs], dense=True), whole)


def test_experts_that_no_token_selects_have_zeros():
    model = TINY["mixtral"]()
    layers = collect(model, [example_inputs(model, batch=1, sequence=1, seed=0)])
    for layer in layers:
        selected = layer["tokens"] > 0
        assert selected.sum() == TOP_K
        for key in set(SPARSE) - {"probability", "logit_gram"}:
            assert not layer[key][~selected].any(), key
            assert layer[key][selected].any(axis=tuple(range(1, layer[key].ndim))).all(), key
    for layer in collect(model, []):
        assert layer.token_count == 0
        assert not any(layer[key].any() for key in SPARSE)


NORMS_E, CHANGES_4 = (1, 2, 6), torch.tensor([0.1, 0.1, 0.5, 0.2])
TOKENS_E = ((0, 1, 3), (0, 1, 2, 3), (2,))
GATES_E = ((0.9, 0.8, 0.6), (0.1, 0.2, 0.5, 0.4), (0.5,))
RUNS = tuple(
    Run(expert, torch.tensor(tokens), torch.tensor(gates), torch.tensor([[0.0, -norm]]).expand(len(tokens), -1))
    for expert, (tokens, gates, norm) in enumerate(zip(TOKENS_E, GATES_E, NORMS_E, strict=True))
)
WORKED: dict[str, list[float]] = {
    "tokens": [3, 4, 1],
    "gate": [2.3, 1.2, 0.5],
    "gate_squared": [1.81, 0.46, 0.25],
    "output_norm": [3, 8, 6],
    "output_norm_squared": [3, 16, 36],
    "gated_norm": [2.3, 2.4, 3.0],
    "gated_norm_squared": [1.81, 1.84, 9.0],
    "gated_norm_change": [0.29, 0.72, 1.50],
    "output_peak": [1, 2, 6],
}
"""Four tokens, three experts with outputs of fixed norms, and how far each token is turned; by hand."""


def test_the_worked_numbers():
    nothing = torch.nn.Identity()
    sums = LayerSums(MoELayer("mlp", nothing, nothing, 3, 2, hidden_size=2, score="softmax", groups=None))
    before_4H = torch.tensor([[1.0, 0.0]]).expand(4, -1)
    after_4H = torch.stack([1 - CHANGES_4, (1 - (1 - CHANGES_4) ** 2).sqrt()], dim=-1)
    sums.add(Seen(torch.zeros(4, 3), before_4H, after_4H - before_4H, RUNS))
    layer = sums.statistics()
    for key, expected in WORKED.items():
        np.testing.assert_allclose(layer[key], expected, rtol=1e-6, err_msg=key)
    np.testing.assert_allclose(layer["output"], [[0, -3], [0, -8], [0, -6]])
    np.testing.assert_allclose(layer["output_squared"], [[0, 3], [0, 16], [0, 36]])
    np.testing.assert_allclose(layer["probability"], [4 / 3] * 3)
    assert not layer["logit_gram"].any()


def test_tokens_that_are_turned_back_or_not_at_all_change_nothing():
    nothing = torch.nn.Identity()
    layer = MoELayer("mlp", nothing, nothing, 1, 1, hidden_size=2, score="softmax", groups=None)
    before_TH = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    added_TH = torch.tensor([[3.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])  # cosines 1, -1, and 0 of a vector of zeros
    sums = LayerSums(layer)
    sums.add(Seen(torch.ones(3, 1), before_TH, added_TH, (Run(0, torch.arange(3), torch.ones(3), added_TH),)))
    np.testing.assert_allclose(sums.statistics()["gated_norm_change"], [0 * 3 + 2 * 2 + 1 * 1])


def test_an_expert_that_only_padding_selects_is_as_if_no_token_had():
    nothing = torch.nn.Identity()
    sums = LayerSums(MoELayer("mlp", nothing, nothing, 3, 2, hidden_size=2, score="softmax", groups=None))
    hidden_4H = torch.ones(4, 2)
    sums.add(Seen(torch.zeros(4, 3), hidden_4H, hidden_4H, RUNS), valid_T=torch.tensor([True, True, False, True]))
    layer = sums.statistics()
    assert layer.token_count == 3
    assert layer["tokens"].tolist() == [3, 3, 0]
    assert layer["output_peak"].tolist() == [1, 2, 0]


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
    assert not any(layer.router._forward_hooks for layer in find_moe_layers(model))
    logits(model, example_inputs(model, 1, 2, seed=0))
