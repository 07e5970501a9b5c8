import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_spec.calibration import Run, Shards, accumulate
from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.statistics import LayerStatistics
from tests.heard import Heard

EXAMPLES = 11
DATA = Dataset({"x": np.random.default_rng(0).standard_normal((EXAMPLES, 4))}, None, "data")
RUN = Run("model of 12 letters and more", "data", EXAMPLES, 2)


def take(feeds):
    """Sums whose last bits depend on the order of summation."""
    x = feeds["x"]
    return (LayerStatistics("mlp", 4, 1, len(x), {"gate": x.sum(axis=0), "output_peak": abs(x).max(axis=0)}),)


@pytest.fixture
def shards(tmp_path):
    return tmp_path / "statistics.safetensors.shards"


class StoppedError(Exception):
    """The end of the process."""


def stopped_after(batches):
    """``take`` for so many batches."""
    left = iter(range(batches))

    def some(feeds):
        if next(left, None) is None:
            raise StoppedError
        return take(feeds)

    return some


def whole(batch_size=2):
    return accumulate(DATA, take, Shards(Path("none"), RUN), batch_size=batch_size)


def assert_same_bytes(left, right):
    for mine, theirs in zip(left, right, strict=True):
        assert (mine.token_count, mine.sums.keys()) == (theirs.token_count, theirs.sums.keys())
        assert all(mine[key].tobytes() == theirs[key].tobytes() for key in mine.sums)


def test_batches_add_up_in_order():
    layers = whole(batch_size=4)
    parts = [take({"x": DATA.feeds["x"][start : start + 4]})[0] for start in (0, 4, 8)]
    np.testing.assert_array_equal(layers[0]["gate"], parts[0]["gate"] + parts[1]["gate"] + parts[2]["gate"])
    np.testing.assert_array_equal(layers[0]["output_peak"], abs(DATA.feeds["x"]).max(axis=0))
    assert layers[0].token_count == EXAMPLES


@settings(max_examples=30)
@given(batch_size=st.integers(1, 4), size=st.integers(1, 6), stops=st.lists(st.integers(0, 4), max_size=3))
def test_however_often_a_run_is_stopped_its_bytes_are_the_same(batch_size, size, stops):
    with tempfile.TemporaryDirectory() as directory:
        shards = Shards(Path(directory) / "shards", dataclasses.replace(RUN, batch_size=batch_size), size)
        for batches in stops:
            try:
                accumulate(DATA, stopped_after(batches), shards, batch_size=batch_size)
            except StoppedError:
                continue
        assert_same_bytes(accumulate(DATA, take, shards, batch_size=batch_size), whole(batch_size))
        shards.remove()
        assert not shards.directory.exists()


def stop(directory, batches=3, **changes):
    """A run that keeps its sums after every 4 examples, killed after so many batches of 2."""
    shards = Shards(directory, dataclasses.replace(RUN, **changes), 4)
    with pytest.raises(StoppedError):
        accumulate(DATA, stopped_after(batches), shards, batch_size=2)


def test_only_what_came_after_the_last_shard_is_computed_again(shards):
    stop(shards)
    heard = Heard()
    accumulate(DATA, take, Shards(shards, RUN), batch_size=2, on_progress=heard)
    assert heard.counts("calibrating") == [(4, 11), (6, 11), (8, 11), (10, 11), (11, 11)]


def test_a_later_shard_takes_the_place_of_the_one_before(shards):
    stop(shards, batches=5)
    assert sorted(path.name for path in shards.iterdir()) == ["process0-000000000008.safetensors", "run.json"]


def test_a_run_that_was_killed_between_two_shards_goes_on_from_the_later_one(shards):
    stop(shards)
    earlier = shards / "process0-000000000004.safetensors"
    content = earlier.read_bytes()
    stop(shards, batches=3)
    earlier.write_bytes(content)
    assert Shards(shards, RUN).last()[0] == 8


def test_each_process_has_shards_of_its_own(shards):
    stop(shards)
    assert Shards(shards, RUN, rank=1).last() == (0, ())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_sha256": "another model of course"}, "model_sha256 model of 12 , this one has another mode"),
        ({"data_sha256": "others"}, "data_sha256 data, this one has others"),
        ({"examples": 10}, "examples 11, this one has 10"),
        ({"batch_size": 3}, "batch_size 2, this one has 3"),
        ({"processes": 4}, "processes 1, this one has 4"),
        ({"options": {"dense": True}}, "options {}, this one has {'dense': True}"),
    ],
)
def test_shards_of_another_run_are_refused(changes, what, shards):
    stop(shards)
    with pytest.raises(UserError) as caught:
        Shards(shards, dataclasses.replace(RUN, **changes)).last()
    assert caught.value.what == f"{shards} holds the shards of a run with {what}"
    assert caught.value.hint == f"run the command as it was, or start anew: rm -r {shards}"


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError) as caught:
        Shards(tmp_path, RUN).last()
    assert caught.value.what == f"{tmp_path / 'run.json'} does not exist, expected a calibration run (JSON)"
    assert caught.value.hint == "check the path"
