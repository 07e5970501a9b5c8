"""What a model costs: latency, throughput, memory, bytes."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moe_spec.dataset import Dataset
from moe_spec.decoder import IDS, PAST, complete, has_cache
from moe_spec.errors import UserError
from moe_spec.progress import Progress, counted, silent
from moe_spec.runner import Feeds
from runtime.backends import open_session
from runtime.execution import BY_DEFAULT, Execution
from runtime.inputs.random_feeds import RandomFeeds
from runtime.measuring.generation import Generation
from runtime.measuring.memory import Alone, Timed, measure_alone
from runtime.model_dir import home, model_bytes


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """One model at one batch size, in one phase.

    Attributes:
        model: its path, as given; of a rival its name.
        batch_size: examples a run.
        phase: ``prefill`` or ``decode`` of a decoder with a cache, else empty.
        median_ms: latency of a run.
        p90_ms: nine of ten runs were quicker.
        p99_ms: 99 of 100 were.
        examples_per_second: at the median.
        tokens_per_second: at the median, of all examples together; None where the model takes no token ids.
        load_ms: that opening it takes in a fresh process, its files in the system's cache or not.
        memory_bytes: that opening it and one run add to the peak of that process; None where it cannot be measured.
        file_bytes: of the graph and its weights, or of the engine.
    """

    model: str
    batch_size: int
    phase: str
    median_ms: float
    p90_ms: float
    p99_ms: float
    examples_per_second: float
    tokens_per_second: float | None
    load_ms: float
    memory_bytes: int | None
    file_bytes: int


PREFILL, DECODE = "prefill", "decode"


class Contestant(Protocol):
    """What is timed. Files are opened here; whatever else, such as a checkpoint in torch, is brought along."""

    @property
    def name(self) -> str:
        """As rows call it."""
        ...

    @property
    def directory(self) -> Path:
        """Whose config.json, if there is one, tells the size of a vocabulary."""
        ...

    @property
    def file_bytes(self) -> int:
        """Of all that is run."""
        ...

    def open(self, threads: int) -> Timed:
        """A session in this process.

        Raises:
            UserError: it cannot be opened.
        """
        ...

    def alone(self, leading: int, other: int, past: int, threads: int) -> Alone:
        """What it takes in a process of its own, as `runtime.measuring.memory.measure_alone` has it.

        Raises:
            UserError: the process failed.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _OfFile:
    """An engine directory, a model directory or an .onnx file."""

    path: Path
    execution: Execution = BY_DEFAULT

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def directory(self) -> Path:
        return home(self.path)

    @property
    def file_bytes(self) -> int:
        return model_bytes(self.path)

    def open(self, threads: int) -> Timed:
        return open_session(self.path, threads, self.execution)

    def alone(self, leading: int, other: int, past: int, threads: int) -> Alone:
        how = self.execution.to_json()
        return measure_alone(self.path, leading, other, past, threads, execution=how)


def bench(
    models: Sequence[Path],
    batch_sizes: Sequence[int] = (1, 64),
    *,
    repeats: int = 30,
    warmup: int = 3,
    threads: int = 1,
    execution: Execution = BY_DEFAULT,
    length: int = 32,
    past: int | None = None,
    data: Dataset | None = None,
    rivals: Sequence[Contestant] = (),
    on_progress: Progress = silent,
) -> list[BenchRow]:
    """Time models against each other, turn by turn, so that what else the machine does hits all alike.

    Args:
        models: engine directories, model directories or .onnx files.
        batch_sizes: examples a run.
        repeats: timed runs of each model at each batch size.
        warmup: runs before the first that is timed.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run the models.
        length: of dynamic axes that do not lead an input, e.g. tokens of a sequence; of ``data`` it is their own.
        past: tokens in the cache of decoders that have one, at a step of decoding; None for ``length``.
        data: examples to feed; by default random ones (`RandomFeeds`). Memory is measured with random ones, as long as
            these.
        rivals: what else takes turns with the models, on the same feeds.
        on_progress: told of every turn, not while a run is timed, and of every process that measures memory.

    Returns:
        A row for each model and batch size, models together, as given, rivals last. Decoders with a cache have two, and
        are run as generation runs them, the cache left where it is: ``prefill``, a prompt of ``length`` tokens (or of
        ``data``), and ``decode``, one token behind a prompt of ``past``.

    Raises:
        UserError: a model cannot be opened or does not take the batch size, or ``data`` holds too few examples.
    """
    _check_counts(models, batch_sizes, repeats)
    timed = []
    contestants = [*(_OfFile(model, execution) for model in models), *rivals]
    with _opened(contestants, threads) as sessions:
        for size in batch_sizes:
            runs = [
                run
                for contestant, session in zip(contestants, sessions, strict=True)
                for run in _runs(contestant, session, size, length, length if past is None else past, data)
            ]
            what = f"timing {size} examples a run"
            times = _times([run.call for run in runs], repeats, warmup, what, on_progress)
            timed += [(run, taken) for run, taken in zip(runs, times, strict=True) if run.phase is not None]
    timed.sort(key=lambda row: contestants.index(row[0].contestant))
    each = counted(timed, "measuring memory", len(timed), on_progress)
    return [_row(run, taken, threads) for run, taken in each]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is timed: a call of a contestant.

    Attributes:
        contestant: whose call it is.
        call: what is done.
        size: examples.
        phase: as in a row; None where no row tells of it.
        length: new tokens of an example.
        past: tokens of it in the cache.
        tokens: new ones of all examples; None where the model takes no ids.
    """

    contestant: Contestant
    call: Callable[[], object]
    size: int
    phase: str | None
    length: int
    past: int
    tokens: int | None


def _runs(who: Contestant, session: Timed, size: int, length: int, past: int, data: Dataset | None) -> Iterator[_Run]:
    """A run of any model; of a decoder with a cache a prompt, and a token behind one."""
    feeds = _feeds(who, session, size, length, 0, data)
    if data is not None:
        length = _length(session, feeds, length)
    tokens = feeds[IDS].size if IDS in feeds else None
    if not has_cache(session.inputs):
        yield _Run(who, functools.partial(session.run, feeds), size, "", length, 0, tokens)
        return
    token = _feeds(who, session, size, 1, past, None)
    generation = Generation(session, feeds, token)
    yield _Run(who, generation.read, size, PREFILL, length, 0, tokens)
    if past != length or data is not None:  # else the token comes behind the prompt that was just timed
        generation = Generation(session, _feeds(who, session, size, past, 0, None) if past else None, token)
        yield _Run(who, generation.read, size, None, past, 0, None)
    yield _Run(who, generation.write, size, DECODE, 1, past, size)


def _length(session: Timed, feeds: Feeds, default: int) -> int:
    """The longest of the dynamic axes that do not lead an input and are not of a cache; ``default`` without any."""
    leading = {spec.shape[0] for spec in session.inputs if spec.shape}
    given = [spec for spec in session.inputs if spec.name in feeds and not spec.name.startswith(PAST)]
    axes = (zip(spec.shape, feeds[spec.name].shape, strict=False) for spec in given)  # a run refuses what does not fit
    lengths = [length for pairs in axes for dim, length in pairs if isinstance(dim, str) and dim not in leading]
    return max(lengths, default=default)


def median_latencies(
    models: Sequence[Path], batch_size: int, *, repeats: int = 30, warmup: int = 3, threads: int = 1, length: int = 32
) -> list[float]:
    """Milliseconds a run of each of ``models``, nothing else: ``bench`` without a look at memory and files.

    Raises:
        UserError: a model cannot be opened or does not take the batch size.
    """
    _check_counts(models, [batch_size], repeats)
    files = [*map(_OfFile, models)]
    with _opened(files, threads) as sessions:
        feeds = [
            _feeds(file, session, batch_size, length, 0, None) for file, session in zip(files, sessions, strict=True)
        ]
        calls = [functools.partial(session.run, fed) for session, fed in zip(sessions, feeds, strict=True)]
        return [float(np.median(times)) for times in _times(calls, repeats, warmup)]


@contextlib.contextmanager
def _opened(contestants: Sequence[Contestant], threads: int) -> Iterator[list[Timed]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contestant.open(threads)) for contestant in contestants]


def _times(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    warmup: int,
    what: str = "timing",
    on_progress: Progress = silent,
) -> list[list[float]]:
    """Milliseconds of every repeat of each call."""
    named = {str(index): call for index, call in enumerate(calls)}
    return list(time_in_turns(named, repeats=repeats, warmup=warmup, what=what, on_progress=on_progress).values())


def _check_counts(models: Sequence[Path], batch_sizes: Sequence[int], repeats: int) -> None:
    if not models or not batch_sizes or min(*batch_sizes, repeats) < 1:
        raise UserError(
            f"nothing to measure: {len(models)} models, batch sizes {list(batch_sizes)}, {repeats} repeats",
            hint="give at least one model, one batch size of 1 or more, and one repeat",
        )


def _feeds(contestant: Contestant, session: Timed, size: int, length: int, past: int, data: Dataset | None) -> Feeds:
    for spec in session.inputs:
        if spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] != size:
            raise UserError(
                f"{contestant.name}: input {spec.name} takes exactly {spec.shape[0]} examples, asked for {size}",
                hint=f"bench it at its own batch size: --batch-size {spec.shape[0]}",
            )
    if data is None:
        return RandomFeeds.of(session.inputs, contestant.directory).draw(size, length, seed=0, past=past)
    if len(data) < size:
        raise UserError(f"the data holds {len(data)} examples, asked for {size} at once", hint="give more data")
    return complete(session.inputs, data.first(size).feeds)


def _row(run: _Run, times: Sequence[float], threads: int) -> BenchRow:
    """Of what was timed, and of the same in a process of its own."""
    who, alone = run.contestant, run.contestant.alone(run.size, run.length, run.past, threads)
    return row_of(who.name, run.size, times, alone, who.file_bytes, phase=run.phase or "", tokens=run.tokens)


def row_of(
    model: str,
    size: int,
    times: Sequence[float],
    alone: Alone,
    file_bytes: int,
    *,
    phase: str = "",
    tokens: int | None = None,
) -> BenchRow:
    """What ``times``, the milliseconds of each run of ``size`` examples with ``tokens`` new tokens in all, come to."""
    median = float(np.median(times))
    return BenchRow(
        model=model,
        batch_size=size,
        phase=phase,
        median_ms=median,
        p90_ms=float(np.percentile(times, 90)),
        p99_ms=float(np.percentile(times, 99)),
        examples_per_second=1000 * size / median,
        tokens_per_second=None if tokens is None else 1000 * tokens / median,
        load_ms=alone.load_ms,
        memory_bytes=alone.peak_bytes,
        file_bytes=file_bytes,
    )


def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    clock: Callable[[], int] = time.perf_counter_ns,
    what: str = "timing",
    on_progress: Progress = silent,
) -> dict[str, list[float]]:
    """Milliseconds of every repeat of each of ``runs``, which take turns; ``clock`` gives nanoseconds.

    ``on_progress`` is told of ``what`` between two turns, never while a run is timed.

    >>> {name: len(times) for name, times in time_in_turns({"a": int, "b": str}, repeats=3, warmup=1).items()}
    {'a': 3, 'b': 3}
    """
    turns = counted(range(warmup + repeats), what, warmup + repeats, on_progress)
    for _ in itertools.islice(turns, warmup):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in turns:
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append((clock() - start) / 1e6)
    return times
