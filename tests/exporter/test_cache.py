"""What each kind of layer keeps from call to call, found without computing anything."""

import pytest
import torch

from exporter.cache import cache_of, empty_cache, find_states, tensors_in
from exporter.trace import TRACED
from moe_spec.errors import UserError
from tests.decoders import DECODERS, WINDOW
from tests.families.configs import tiny
from tests.models_table import HIDDEN

B, P = "batch_size", "past_sequence_length"
HINT = "export it without: moe-edge export --no-cache"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("mixtral", {"0.key": (B, 2, P, 8), "0.value": (B, 2, P, 8)}),
        ("gpt_oss", {"0.key": (B, 2, P, 8), "0.value": (B, 2, P, 8)}),
        ("deepseek_v3", {"0.key": (B, 1, P, 16), "0.value": (B, 1, P, 8)}),
        ("lfm2_moe", {"0.conv_state": (B, HIDDEN, 3), "1.key": (B, 4, P, 8)}),
    ],
)
def test_shapes_and_names_of_what_is_kept(name, first):
    states = find_states(DECODERS[name]())
    assert {state.name: state.shape for state in states[:2]} == first
    assert {state.dtype for state in states} == {torch.float32}
    assert len(states) == 3 if name == "lfm2_moe" else 4


def test_a_model_without_weights_keeps_the_same():
    with torch.device("meta"):
        empty = type(DECODERS["qwen3_moe"]())(DECODERS["qwen3_moe"]().config)
    assert find_states(empty) == find_states(DECODERS["qwen3_moe"]())


def test_layers_with_a_window_keep_every_token():
    model = DECODERS["mixtral"]()
    states, length = find_states(model), 3 * WINDOW
    past = [torch.randn(1, 2, length, 8) for _ in states]
    cache = cache_of(model.config, states, past)
    with torch.inference_mode():
        model(input_ids=torch.ones(TRACED, dtype=torch.int64)[:1], past_key_values=cache, use_cache=True)
    kept = [tensor for *_, tensor in tensors_in(cache)]
    for before, after in zip(past, kept, strict=True):
        assert after.shape[2] == length + TRACED[1]
        torch.testing.assert_close(after[:, :, :length], before)


def test_a_cache_that_is_no_table_of_tokens_is_refused():
    with pytest.raises(UserError) as refusal:
        find_states(tiny("deepseek_v4"))
    assert (refusal.value.what, refusal.value.hint) == (
        "the model has no cache that can be an input: layer 0 keeps a DeepseekV4HCACache, not one value for each token",
        HINT,
    )


def test_a_model_with_a_cache_of_its_own_is_refused():
    with pytest.raises(UserError) as refusal:
        find_states(tiny("minimax"))
    assert refusal.value.what.startswith(
        "the model has no cache that can be an input: ValueError: MiniMax uses cache of its own"
    )
    assert refusal.value.hint == HINT


def test_an_empty_cache_has_seen_nothing():
    assert empty_cache(DECODERS["gpt_oss"]().config).get_seq_length() == 0
