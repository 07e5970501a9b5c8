"""A session may run for days: nothing of a run stays when its outputs are let go."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from moe_spec.decoder import IDS
from runtime.backends import open_session
from runtime.text.generate import generate
from runtime.text.sampling import Sampling
from tests.runtime import tiny

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="only Linux counts what a process holds")

ALLOWED = 4 << 20
"""Bytes: what a leak would hold on to in either test is four times as much at the least."""
WARM_UP = 5


def resident():
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(work, rounds):
    """Bytes that all rounds but the first few add."""
    for _ in range(WARM_UP):
        work()
    before = resident()
    for _ in range(rounds - WARM_UP):
        work()
    return resident() - before


def test_ten_thousand_runs_hold_no_memory(tmp_path):
    """An output of 2 KB that stayed each time would be 20 MB, the input more."""
    feeds = {"x": tiny.examples(16)}
    with open_session(tiny.write(tmp_path / "model") / "observed.onnx", threads=1) as session:
        size = sum(array.nbytes for array in session.run(feeds).values())
        assert 10_000 * min(size, feeds["x"].nbytes) > 5 * ALLOWED

        def hundred():
            for _ in range(100):
                session.run(feeds)

        assert growth(hundred, 100) < ALLOWED


def test_answers_hold_no_memory_when_they_end_or_are_abandoned(zoo):
    """A cache that stayed at every step would be 20 MB."""
    prompts = np.random.default_rng(0).integers(4, 100, (16, 24)).tolist()
    rounds, steps = 100, 2
    with open_session(zoo.cached("mixtral"), threads=1) as session:
        cache = sum(value.numpy().nbytes for value in session.step({IDS: np.array(prompts)})[1].values())
        assert rounds * steps * cache > 4 * ALLOWED

        def answer():
            for tokens in (steps, 10 * steps):
                answers = generate(session, prompts, Sampling(max_new_tokens=tokens))
                for _ in range(steps):
                    next(answers)
                answers.close()

        assert growth(answer, rounds // 2) < ALLOWED
