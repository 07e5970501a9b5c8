import re

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16" by name)
import numpy as np
import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from runtime.inputs.feeds import check_feeds
from runtime.inputs.random_feeds import RandomFeeds
from runtime.verification.sides import cast_to

IDS = TensorSpec("input_ids", "int64", ("batch", "length"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "length"))
POSITIONS = TensorSpec("position_ids", "int64", ("batch", "length"))
DECODER = (
    IDS,
    TensorSpec("attention_mask", "int64", ("batch", "length so far")),
    POSITIONS,
    TensorSpec("past_key_values.0.key", "float32", ("batch", 2, "kept", 8)),
    TensorSpec("past_key_values.1.conv_state", "float32", ("batch", 4, 3)),
)
IMAGE = TensorSpec("pixel_values", "float32", ("batch", 1, 4, 4))


def test_random_feeds_fit_the_inputs_at_three_shapes_the_first_a_single_token(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 11}')
    inputs = (IDS, MASK, POSITIONS, IMAGE)
    feeds = list(RandomFeeds.of(inputs, tmp_path).three_shapes())
    for each in feeds:
        check_feeds(inputs, each, "model")
    assert [each["input_ids"].shape for each in feeds] == [(1, 1), (2, 7), (5, 4)]
    assert 2 <= feeds[1]["input_ids"].max() < 11
    assert (feeds[1]["attention_mask"] == 1).all()
    assert feeds[1]["position_ids"].tolist() == [list(range(7))] * 2
    assert feeds[1]["pixel_values"].std() > 0.5


def test_random_feeds_go_on_from_what_is_in_the_cache(tmp_path):
    feeds = list(RandomFeeds.of(DECODER, tmp_path).three_shapes())
    for each in feeds:
        check_feeds(DECODER, each, "model")
    assert [each["attention_mask"].shape for each in feeds] == [(1, 4), (2, 7), (5, 10)]
    assert [each["past_key_values.0.key"].shape for each in feeds] == [(1, 2, 3, 8), (2, 2, 0, 8), (5, 2, 6, 8)]
    assert [each["position_ids"][-1].tolist() for each in feeds] == [[3], [*range(7)], [6, 7, 8, 9]]


def test_a_cache_in_bfloat16_is_drawn_and_cast_as_floats_are(tmp_path):
    half, single = (TensorSpec("past_key_values.0.key", dtype, ("batch", 4)) for dtype in ("bfloat16", "float32"))
    drawn = RandomFeeds.of([single], tmp_path).draw(64, 1, seed=0)
    for feeds in (RandomFeeds.of([half], tmp_path).draw(64, 1, seed=0), cast_to([half], drawn)):
        check_feeds([half], feeds, "model")
        assert feeds[half.name].astype(np.float32).std() > 0.5
        np.testing.assert_allclose(cast_to([single], feeds)[half.name], drawn[half.name], rtol=1e-2)


def test_a_mask_for_other_tokens_than_there_are_is_refused(tmp_path):
    feeds = dict(RandomFeeds.of(DECODER, tmp_path).draw(2, 4, seed=0, past=3))
    feeds["attention_mask"] = feeds["attention_mask"][:, 3:]
    message = (
        "model: attention_mask is [2, 4], expected [2, 7]: 3 tokens are in the cache, 4 are new\n"
        "hint: give the mask of all tokens so far"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_feeds(DECODER, feeds, "model")


def test_random_feeds_are_the_same_every_time(tmp_path):
    first, second = (next(iter(RandomFeeds.of((IMAGE,), tmp_path).three_shapes())) for _ in range(2))
    np.testing.assert_array_equal(first["pixel_values"], second["pixel_values"])


def test_without_a_vocabulary_ids_are_0_or_1(tmp_path):
    assert RandomFeeds.of((IDS,), tmp_path).draw(9, 9, seed=0)["input_ids"].max() == 1


def test_a_nested_text_config_tells_the_vocabulary_too(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 7}}')
    assert RandomFeeds.of((IDS,), tmp_path).vocabulary == 7


def test_a_cut_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    message = f"{tmp_path}/config.json is no complete JSON: Expecting value: line 1 column 16 (char 15)"
    with pytest.raises(UserError, match=f"^{re.escape(message)}\nhint: export the model again$"):
        RandomFeeds.of((IDS,), tmp_path)


@pytest.mark.parametrize("config", ['{"text_config": null}', '{"text_config": [7]}', '{"vocab_size": "many"}'])
def test_a_vocabulary_that_is_none_is_none(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    assert RandomFeeds.of((IDS,), tmp_path).vocabulary == 2


def test_a_config_that_is_a_list_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[7]")
    message = f"{tmp_path}/config.json holds a list, expected a JSON object\nhint: export the model again"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        RandomFeeds.of((IDS,), tmp_path)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        (
            {"ids": np.zeros((1, 2), np.int64), "attention_mask": np.zeros((1, 2), np.int64)},
            "model: inputs are attention_mask, ids, expected attention_mask, input_ids\n"
            "hint: name the arrays like the model's inputs",
        ),
        (
            {},
            "model: inputs are none, expected attention_mask, input_ids\nhint: name the arrays like the model's inputs",
        ),
        (
            {"input_ids": np.zeros((1, 2), np.int32), "attention_mask": np.zeros((1, 2), np.int64)},
            "model: input input_ids is int32[1, 2], expected int64[batch, length]\n"
            "hint: store it as int64: array.astype('int64')",
        ),
        (
            {"input_ids": np.zeros(2, np.int64), "attention_mask": np.zeros((1, 2), np.int64)},
            "model: input input_ids is int64[2], expected int64[batch, length]\n"
            "hint: check what the axes mean; examples are on axis 0",
        ),
        (
            {"input_ids": np.zeros((2, 3), np.int64), "attention_mask": np.zeros((2, 4), np.int64)},
            "model: axis 'length' is 3 in input_ids, but 4 in attention_mask\n"
            "hint: give all inputs the same number of examples and the same lengths",
        ),
    ],
)
def test_feeds_that_do_not_fit_are_refused(feeds, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_feeds((IDS, MASK), feeds, "model")
