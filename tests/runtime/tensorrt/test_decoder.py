"""Decoders in sessions of engines: their cache stays on the GPU. Over the stand-in, as in test_tensorrt_session.py."""

import contextlib
import re
from typing import Any

import numpy as np
import pytest

from moe_spec.errors import UserError
from runtime.tensorrt.session import EngineSession
from runtime.text.generate import generate
from runtime.text.sampling import Sampling
from tests.runtime.tensorrt.gpu_stand_in import KEPT, DecoderContext, Engine, HostDriver, decoder, library


@contextlib.contextmanager
def opened(tmp_path, longest=64, foresees=True):
    """A session and its driver."""
    driver: Any = HostDriver()
    context = DecoderContext(driver, fails=False)
    context.foresees = foresees
    (tmp_path / "model.engine").write_bytes(b"plan")
    engine = Engine(context)
    with EngineSession(library(engine), tmp_path / "model.engine", decoder(longest), driver) as session:
        yield session, driver


def decode(session, ids_BT, lengths):
    """Logits (B, T), ``lengths`` tokens at a time."""
    logits, kept, end = [], None, 0
    for length in lengths:
        start, end = end, end + length
        mask_BT = np.ones((len(ids_BT), end), np.int64)
        outputs, kept = session.step({"input_ids": ids_BT[:, start:end], "attention_mask": mask_BT}, kept)
        assert set(outputs) == {"logits"}
        logits.append(outputs["logits"][..., 0])
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("lengths", [(5, *[1] * 40), (3, 4, 1, 20, 1, 1), (1, 1)], ids=str)
def test_the_cache_never_comes_to_the_host(tmp_path, lengths):
    with opened(tmp_path) as (session, driver):
        for seed in (0, 1):  # the second text must not see the first
            ids_BT = np.random.default_rng(seed).integers(1, 99, (2, sum(lengths)))
            driver.uploaded.clear()
            np.testing.assert_array_equal(decode(session, ids_BT, lengths), ids_BT.cumsum(axis=1))
            floats = [array for array in driver.uploaded if array.dtype == np.float32]
            assert [array.size for array in floats] == [0]  # the empty cache that a text begins with


def test_a_cache_of_which_nobody_knows_how_long_it_will_be_goes_through_the_host(tmp_path):
    ids_BT = np.arange(12).reshape(2, 6)
    with opened(tmp_path, foresees=False) as (session, _):
        np.testing.assert_array_equal(decode(session, ids_BT, (3, 1, 2)), ids_BT.cumsum(axis=1))


def test_a_run_between_two_steps_leaves_the_cache_alone(tmp_path):
    with opened(tmp_path) as (session, _):
        first, kept = session.step({"input_ids": np.array([[3, 4]])})
        alone = {"input_ids": np.array([[7]]), "attention_mask": np.ones((1, 1), np.int64)}
        outputs = session.run({**alone, KEPT: np.zeros((1, 0, 1), np.float32)})
        second, _ = session.step({"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 3), np.int64)}, kept)
        assert (first["logits"].ravel().tolist(), second["logits"].item()) == ([3, 7], 12)
        assert (outputs["logits"].item(), outputs["present.0.key"].item()) == (7, 7)


def test_a_cache_that_grows_beyond_the_profile_is_refused(tmp_path):
    message = (
        f"{tmp_path}: the inputs are input_ids [1, 1], attention_mask [1, 4], {KEPT} [1, 3, 1], the engine was built "
        f"for input_ids [1, 1] to [4, 2], attention_mask [1, 1] to [4, 4], {KEPT} [1, 0, 1] to [4, 2, 1]\n"
        "hint: feed other shapes, or build it again with a wider profile"
    )
    with opened(tmp_path, longest=2) as (session, _), pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        decode(session, np.ones((1, 4), np.int64), (2, 1, 1))


def test_texts_are_generated(tmp_path):
    """One logit: the only token there is comes every time."""
    with opened(tmp_path) as (session, driver):
        prompts = [[4, 5, 6], [9]]
        tokens = [row.tolist() for row in generate(session, prompts, Sampling(max_new_tokens=3))]
    assert tokens == [[0, 0]] * 3
    assert sum(array.nbytes for array in driver.uploaded if array.dtype == np.float32) == 0
