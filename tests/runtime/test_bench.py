import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from moe_spec.dataset import Dataset
from moe_spec.decoder import IDS, PAST
from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Arrays, Feeds, Kept
from runtime.backends import open_session
from runtime.bench import DECODE, PREFILL, bench, median_latencies, time_in_turns
from runtime.measuring.memory import Alone, Timed, measure_alone
from runtime.model_dir import model_bytes
from tests.runtime import tiny
from tests.runtime.tiny import Tiny


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def test_there_is_a_row_for_each_model_and_batch_size_in_order(model, tmp_path):
    small = tiny.write(tmp_path / "small", Tiny(keep=(1,)))
    rows = bench([model, small], (1, 4), repeats=5, warmup=1)
    assert [(row.model, row.batch_size) for row in rows] == [
        (str(model), 1),
        (str(model), 4),
        (str(small), 1),
        (str(small), 4),
    ]
    for row in rows:
        assert 0 < row.median_ms <= row.p90_ms <= row.p99_ms
        assert (row.phase, row.tokens_per_second) == ("", None)
        assert row.load_ms > 0
        assert row.examples_per_second == pytest.approx(1000 * row.batch_size / row.median_ms)
        assert row.file_bytes == model_bytes(Path(row.model))
    assert rows[2].file_bytes < rows[0].file_bytes


def test_ids_are_drawn_from_the_vocabulary_that_lies_beside_a_file(model, monkeypatch):
    asked: list[Path] = []

    def no_ids(config: Path) -> int:
        asked.append(config)
        return 2

    monkeypatch.setattr("runtime.inputs.random_feeds._vocabulary", no_ids)
    median_latencies([model / "model.onnx"], 1, repeats=1, warmup=0)
    assert asked == [model / "config.json"]


@dataclasses.dataclass(frozen=True)
class Rival:
    """Opens a model, and measures nothing."""

    directory: Path
    name: str = "rival"
    file_bytes: int = 5
    session: Timed | None = None

    def open(self, threads: int) -> Timed:
        return self.session or open_session(self.directory, threads)

    def alone(self, leading: int, other: int, past: int, threads: int) -> Alone:
        return Alone(load_ms=float(f"{leading}{other}{past}{threads}"), peak_bytes=None)


def test_rivals_come_last_and_say_themselves_what_they_take(model):
    ours, theirs = bench([model], (2,), repeats=1, warmup=0, length=3, rivals=[Rival(model)])
    assert (ours.model, theirs.model) == (str(model), "rival")
    assert (theirs.batch_size, theirs.load_ms, theirs.memory_bytes, theirs.file_bytes) == (2, 2301.0, None, 5)
    assert theirs.median_ms > 0


@dataclasses.dataclass
class Decoder:
    """A session that writes down its steps: how many tokens are new, and how many its cache holds."""

    steps: list[tuple[int, int | None]] = dataclasses.field(default_factory=list)
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec(IDS, "int64", ("batch", "sequence")),
        TensorSpec(f"{PAST}0.key", "float32", ("batch", 1, "past", 4)),
    )

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        raise AssertionError(f"generation takes steps, not {sorted(feeds)} to {outputs}")

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:
        seen = None if kept is None else kept["seen"]
        self.steps.append((feeds[IDS].shape[1], seen))
        return {}, {"seen": feeds[IDS].shape[1] + (seen or 0)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("past", "steps"),
    [
        (None, [(3, None), (1, 3)]),  # behind the prompt that is timed
        (5, [(3, None), (5, None), (1, 5)]),
        (0, [(3, None), (1, None)]),
    ],
)
def test_a_token_is_timed_behind_a_prompt_as_generation_takes_its_steps(model, past, steps):
    session = Decoder()
    rivals = [Rival(model, session=session)]
    _, prompt, token = bench([model], (2,), repeats=2, warmup=1, length=3, past=past, rivals=rivals)
    assert session.steps == 3 * steps
    assert (prompt.phase, token.phase) == (PREFILL, DECODE)
    assert prompt.tokens_per_second == pytest.approx(6000 / prompt.median_ms)
    assert token.tokens_per_second == pytest.approx(2000 / token.median_ms)
    assert token.load_ms == float(f"21{3 if past is None else past}1")


def test_latencies_are_those_of_the_models_in_order(model, tmp_path):
    assert len(median_latencies([model, tiny.write(tmp_path / "small", Tiny(keep=(1,)))], 2, repeats=3)) == 2
    with pytest.raises(UserError, match="nothing to measure: 0 models, batch sizes"):
        median_latencies([], 1)


def test_runs_take_turns():
    calls: list[str] = []
    times = time_in_turns({name: partial(calls.append, name) for name in "ab"}, repeats=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_progress_is_told_between_turns_and_never_within_one():
    happened: list[object] = []
    runs = {name: partial(happened.append, name) for name in "ab"}
    time_in_turns(runs, repeats=1, warmup=1, on_progress=lambda *told: happened.append(told))
    assert happened == [("timing", 0, 2), "a", "b", ("timing", 1, 2), "a", "b", ("timing", 2, 2)]


def test_any_clock_will_do():
    ticks = iter(range(0, 40_000_000, 5_000_000))
    times = time_in_turns(dict.fromkeys("ab", int), repeats=2, warmup=1, clock=lambda: next(ticks))
    assert times == {"a": [5.0, 5.0], "b": [5.0, 5.0]}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts the peak")
def test_a_larger_batch_takes_more_memory(model):
    small, large = (measure_alone(model, leading=size, other=64, past=0, threads=1).peak_bytes for size in (1, 4000))
    assert small is not None
    assert large is not None
    assert 0 < small < large


def test_a_model_may_be_named_twice(model):
    assert len(bench([model, model], (1,), repeats=1, warmup=0)) == 2


def test_data_is_fed_where_it_is_given(model):
    data = Dataset({"x": tiny.examples(4)}, None, "")
    assert len(bench([model], (4,), repeats=1, warmup=0, data=data)) == 1


def test_memory_is_measured_at_the_length_of_the_data(model):
    """A row tells of one shape."""
    data = Dataset({"x": tiny.examples(2, sequence=9)}, None, "")
    _, theirs = bench([model], (2,), repeats=1, warmup=0, length=3, data=data, rivals=[Rival(model)])
    assert theirs.load_ms == 2901.0


@pytest.mark.parametrize(
    ("sizes", "data", "message"),
    [
        (
            (8,),
            Dataset({"x": tiny.examples(4)}, None, ""),
            "the data holds 4 examples, asked for 8 at once\nhint: give more data",
        ),
        (
            (1,),
            Dataset({"y": tiny.examples(4)}, None, ""),
            "{model}: inputs are y, expected x\nhint: name the arrays like the model's inputs",
        ),
        (
            (0,),
            None,
            "nothing to measure: 1 models, batch sizes [0], 1 repeats\n"
            "hint: give at least one model, one batch size of 1 or more, and one repeat",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model, sizes, data, message):
    with pytest.raises(UserError, match=f"^{re.escape(message.format(model=model))}$"):
        bench([model], sizes, repeats=1, warmup=0, data=data)


def test_a_model_with_a_fixed_batch_is_not_asked_for_another(tmp_path):
    import onnx

    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "fixed.onnx")
    message = (
        f"{tmp_path}/fixed.onnx: input x takes exactly 2 examples, asked for 1\n"
        "hint: bench it at its own batch size: --batch-size 2"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        bench([tmp_path / "fixed.onnx"], (1,))


def test_the_memory_of_a_model_that_cannot_run_is_an_error(model):
    with pytest.raises(UserError, match=r"what .*/no takes cannot be measured: .*does not exist"):
        measure_alone(model / "no", leading=1, other=1, past=0, threads=1)
