"""Tokens, one after the other: the same as transformers gives, from graphs with every kind of cache."""

import re
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from models.checkpoints import load_model
from moe_spec.dataset import MASK
from moe_spec.decoder import IDS, step_in_memory
from moe_spec.errors import UserError
from runtime.backends import open_session
from runtime.text.generate import generate, pad_left
from runtime.text.sampling import Sampling, choose
from tests.decoders import DECODERS
from tests.runtime import tiny

PROMPTS = [[5, 17, 90, 33, 6, 71, 101, 8, 44, 9, 12], [64], [7, 7, 23, 99]]
STEPS = 64


def generated(directory, prompts, sampling):
    """(B, steps)."""
    with open_session(directory, threads=1) as session:
        return np.stack(list(generate(session, prompts, sampling)), axis=1)


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_greedy_tokens_are_those_of_transformers(name, zoo):
    model: Any = load_model(zoo.decoder(name))
    ids, mask = map(torch.from_numpy, pad_left(PROMPTS, padding=0))
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].numpy()
    found = generated(zoo.cached(name), PROMPTS, Sampling(max_new_tokens=STEPS))
    assert found.shape == (3, STEPS)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 10  # not the same few over and over


def test_a_prompt_alone_goes_on_as_it_does_among_others(zoo):
    together = generated(zoo.cached("mixtral"), PROMPTS, Sampling(max_new_tokens=9))
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert generated(zoo.cached("mixtral"), [prompt], Sampling(max_new_tokens=9))[0].tolist() == row.tolist()


@pytest.mark.parametrize("name", ["mixtral", "exported"])
def test_a_cache_that_stays_where_it_is_changes_no_bit(name, zoo):
    """Step by step, with a cache that comes out as arrays and goes in again, and for a model that has none."""
    directory = zoo.exported("qwen3_moe") if name == "exported" else zoo.cached(name)
    ids, mask = pad_left(PROMPTS, padding=0)
    kept: Any = None
    copied: Any = None
    with open_session(directory, threads=1) as session:
        for _ in range(5):
            feeds = {IDS: ids, MASK: mask}
            mine, kept = session.step(feeds, kept)
            theirs, copied = step_in_memory(session.run, session.inputs, feeds, copied)
            np.testing.assert_array_equal(mine["logits"], theirs["logits"])
            assert mine.keys() == theirs.keys() == {"logits"}
            assert {key: value.numpy().tobytes() for key, value in kept.items()} == {
                key: array.tobytes() for key, array in copied.items()
            }
            following = mine["logits"][:, -1].argmax(axis=1)[:, None]
            ids = following if kept else np.concatenate((ids, following), axis=1)
            mask = np.concatenate((mask, np.ones_like(following)), axis=1)


def test_a_cache_is_handed_on_without_a_copy(zoo):
    """What a step is given is read where it lies: written over, it is what the step has read."""
    ids, mask = pad_left(PROMPTS[:1], padding=0)
    with open_session(zoo.cached("mixtral"), threads=1) as session:
        _, kept = session.step({IDS: ids, MASK: mask})
        kept["past_key_values.0.value"].numpy()[...] = 7  # a view of ONNX Runtime's own memory
        _, after = session.step({IDS: ids[:, :1], MASK: np.ones((1, ids.shape[1] + 1), np.int64)}, kept)
    assert (after["past_key_values.0.value"].numpy()[:, :, :-1] == 7).all()


def test_a_step_says_what_it_lacks(zoo):
    with open_session(zoo.cached("mixtral"), threads=1) as session:
        with pytest.raises(UserError, match=r": inputs are none, expected .*input_ids"):
            session.step({})
        _, kept = session.step({IDS: np.array([[5, 6]])})
        with pytest.raises(UserError, match="cannot run on these inputs"):
            session.step({IDS: np.array([[5], [6]]), MASK: np.ones((2, 3), np.int64)}, kept)


def test_a_generator_that_is_closed_leaves_a_session_that_runs_on(zoo):
    with open_session(zoo.cached("mixtral"), threads=1) as session:
        steps = generate(session, PROMPTS, Sampling(max_new_tokens=STEPS))
        first = next(steps)
        steps.close()
        np.testing.assert_array_equal(next(generate(session, PROMPTS, Sampling(max_new_tokens=1))), first)


def test_a_model_without_a_cache_reads_everything_again(zoo):
    sampling = Sampling(max_new_tokens=9)
    mine, theirs = (generated(path("qwen3_moe"), PROMPTS[:1], sampling) for path in (zoo.exported, zoo.cached))
    np.testing.assert_array_equal(mine, theirs)


def test_who_has_ended_gets_padding_until_all_have(zoo):
    free = generated(zoo.cached("mixtral"), PROMPTS, Sampling(max_new_tokens=20))
    stop = (int(free[0, 2]),)
    ended = generated(zoo.cached("mixtral"), PROMPTS, Sampling(max_new_tokens=20, stop=stop, padding=1))
    assert ended[0, :3].tolist() == free[0, :3].tolist()
    assert set(ended[0, 3:].tolist()) <= {1}
    for row, reference in zip(ended, free, strict=True):
        until = [*np.flatnonzero(np.isin(reference, stop)), len(reference) - 1][0] + 1
        assert row[:until].tolist() == reference[:until].tolist()[: len(row)]


def test_who_is_said_to_have_ended_has(zoo):
    with open_session(zoo.cached("mixtral"), threads=1) as session:
        told = iter(([False, True, False], [False, False, True], [True, False, False]))
        steps = list(generate(session, PROMPTS, Sampling(padding=1), lambda _: np.array(next(told))))
    free = generated(zoo.cached("mixtral"), PROMPTS, Sampling(max_new_tokens=3))
    expected = np.where([[1, 1, 1], [1, 0, 0], [1, 1, 0]], free, 1)
    np.testing.assert_array_equal(np.stack(steps, axis=1), expected)


def test_a_seed_draws_the_same_again(zoo):
    def drawn(seed):
        sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)
        return generated(zoo.cached("mixtral"), PROMPTS, sampling).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


def test_only_the_nucleus_is_drawn_from_as_often_as_it_is_likely():
    logits = np.log(np.array([[0.1, 0.5, 0.15, 0.25]]))
    random = np.random.default_rng(0)
    sampling = Sampling(temperature=1.0, top_p=0.7)
    drawn = [int(choose(logits, sampling, random)[0]) for _ in range(3000)]
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, [0, 2 / 3, 0, 1 / 3], atol=0.03)


def test_only_the_likeliest_are_drawn_from_and_the_nucleus_is_of_them():
    logits = np.log(np.array([[0.1, 0.5, 0.15, 0.25]]))
    random = np.random.default_rng(0)
    drawn = [int(choose(logits, Sampling(temperature=1.0, top_k=3, top_p=0.8), random)[0]) for _ in range(3000)]
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, [0, 2 / 3, 0, 1 / 3], atol=0.03)  # of all four, the third would be in it


def test_a_low_temperature_is_greedy():
    logits = np.random.default_rng(0).standard_normal((5, 40))
    cold = choose(logits, Sampling(temperature=1e-3), np.random.default_rng(1))
    assert cold.tolist() == logits.argmax(axis=1).tolist()


CHAT_MODEL = '{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20}'
"""As most chat models have it."""


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (None, {}, Sampling()),
        ('{"eos_token_id": 2}', {}, Sampling(stop=(2,), padding=2)),
        ('{"eos_token_id": [2, 7], "pad_token_id": 0}', {}, Sampling(stop=(2, 7))),
        ('{"temperature": 0.6, "top_p": 0.9}', {}, Sampling()),
        ('{"do_sample": true, "top_p": 0.9}', {}, Sampling(temperature=1.0, top_p=0.9)),
        ('{"do_sample": true, "temperature": 0.6}', {"temperature": 0.0, "seed": None}, Sampling()),
        ('{"stop_strings": "END"}', {}, Sampling(stop_strings=("END",))),
        ('{"stop_strings": ["a", "b"]}', {"stop_strings": ("c",)}, Sampling(stop_strings=("c",))),
        ('{"max_new_tokens": 9}', {"max_new_tokens": 3}, Sampling(max_new_tokens=3)),
        (CHAT_MODEL, {}, Sampling(temperature=0.6, top_k=20, top_p=0.95)),
        (CHAT_MODEL, {"temperature": 0.0}, Sampling()),
        (CHAT_MODEL, {"top_k": 0}, Sampling(temperature=0.6, top_p=0.95)),
        ('{"do_sample": true, "temperature": null, "top_p": null}', {}, Sampling(temperature=1.0)),
    ],
)
def test_generation_config_says_what_is_not_given(config, given, expected, tmp_path):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(config)
    assert Sampling.of(tmp_path, **given) == expected


def test_what_generation_config_asks_for_in_vain_is_warned_of(tmp_path, caplog):
    path = tmp_path / "generation_config.json"
    path.write_text('{"repetition_penalty": 1.05, "min_p": 0.1, "num_beams": 1, "typical_p": null}')
    assert Sampling.of(tmp_path) == Sampling()
    Sampling.of(tmp_path, temperature=1.0)
    assert caplog.messages == [
        f"{path} asks for repetition_penalty, which is not done here",  # min_p is for draws
        f"{path} asks for min_p, repetition_penalty, which is not done here",
    ]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ('{"max_new_tokens": "64"}', "key 'max_new_tokens' holds '64', expected int"),
        ('{"eos_token_id": [2, "</s>"]}', "key 'eos_token_id' holds '</s>', expected int"),
        ('{"do_sample": true, "temperature": [1]}', "key 'temperature' holds [1], expected float"),
    ],
)
def test_a_generation_config_with_other_types_is_refused(config, what, tmp_path):
    (tmp_path / "generation_config.json").write_text(config)
    with pytest.raises(UserError) as refusal:
        Sampling.of(tmp_path)
    assert (refusal.value.what, refusal.value.hint) == (
        f"{tmp_path}/generation_config.json: {what}",
        "export the model again",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more\nhint: give another max_new_tokens"),
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more\nhint: give another temperature"),
        ({"top_k": -1}, "top_k is -1, expected 0 or more\nhint: give another top_k"),
        ({"seed": -1}, "seed is -1, expected 0 or more\nhint: give another seed"),
        (
            {"top_k": 5},
            "temperature is 0.0, expected more than 0 where top_k is given\nhint: give another temperature",
        ),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0, at most 1\nhint: give another top_p"),
        (
            {"stop_strings": ("a", "")},
            "stop_strings is ('a', ''), expected texts, none empty\nhint: give another stop_strings",
        ),
        (
            {"top_p": 0.5},
            "temperature is 0.0, expected more than 0 where top_p is given\nhint: give another temperature",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Sampling(**options)


@pytest.mark.parametrize("prompts", [[], [[]], [[3], []]])
def test_an_empty_prompt_is_refused(prompts, zoo):
    with pytest.raises(UserError, match=r"^a prompt has no token\nhint: give every prompt at least one$"):
        generated(zoo.cached("mixtral"), prompts, Sampling())


def test_what_is_no_decoder_writes_nothing(tmp_path):
    with pytest.raises(UserError) as refusal:
        generated(tiny.write(tmp_path / "model"), [[1]], Sampling())
    assert (refusal.value.what, refusal.value.hint) == (
        "the model takes x and gives logits: it generates no text",
        "give a decoder, which takes input_ids and gives logits",
    )


def bigrams(path, inputs, body="logits = Gather(table, input_ids)", logits="batch, sequence, 5"):
    """A model of five tokens, which come one after the other."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    bigrams ({inputs}) => (float[{logits}] logits) {{ {body} }}
    """
    model = onnx.parser.parse_model(text)
    table = np.roll(np.eye(5, dtype=np.float32), 1, axis=1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    onnx.save(model, path)
    return path


IDS_ONLY = "int32[batch, sequence] input_ids"
WITH_MASK = f"{IDS_ONLY}, bool[batch, sequence] attention_mask, int32[batch, sequence] position_ids"


@pytest.mark.parametrize("inputs", [IDS_ONLY, WITH_MASK])
def test_a_model_is_given_what_it_takes_in_its_own_formats(inputs, tmp_path):
    model = bigrams(tmp_path / "model.onnx", inputs)
    assert generated(model, [[4, 0], [1, 2]], Sampling(max_new_tokens=3)).tolist() == [[1, 2, 3], [3, 4, 0]]


def test_prompts_of_several_lengths_need_a_mask(tmp_path):
    with pytest.raises(UserError) as refusal:
        generated(bigrams(tmp_path / "model.onnx", IDS_ONLY), [[1], [1, 2]], Sampling())
    assert (refusal.value.what, refusal.value.hint) == (
        "the prompts have 1 and 2 tokens, and the model takes no attention_mask, without which it cannot tell padding",
        "give it one prompt at a time",
    )


def test_what_classifies_texts_writes_none(tmp_path):
    body = "every = Gather(table, input_ids) \n axis = Constant<value_ints = [1]>() \n "
    body += "logits = ReduceMean<keepdims = 0>(every, axis)"
    with pytest.raises(UserError) as refusal:
        generated(bigrams(tmp_path / "model.onnx", IDS_ONLY, body, "batch, 5"), [[1]], Sampling())
    assert (refusal.value.what, refusal.value.hint) == (
        "logits is [batch, 5], expected three axes: the model generates no text",
        "give a decoder, whose logits are of every token; of a classifier give the ids with --input",
    )
