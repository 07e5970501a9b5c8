"""What `moe-edge demo` does, step by step; each step is a call that a Python user would make."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cli.judge import judge
from exporter.export import export
from graph_passes.optimize import optimize
from graph_passes.writers import WRITERS
from models.checkpoints import load_model
from models.vmoe.assets import fashion_mnist
from moe_spec.dataset import load_dataset
from moe_spec.errors import VerificationError
from moe_spec.files import sha256_file
from moe_spec.manifest import FILE_NAME, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import Feeds
from pruning.calibrate import calibrate
from pruning.finetuning.finetune import finetune
from pruning.finetuning.options import Plain
from pruning.finetuning.recipe import RECIPES
from pruning.options import PlanOptions
from pruning.plan import plan
from pruning.prune import prune
from runtime.backend import BuildOptions
from runtime.backends import open_session
from runtime.bench import BenchRow, row_of, time_in_turns
from runtime.bench_report import BenchReport
from runtime.build import build
from runtime.measuring.machine import describe_machine
from runtime.measuring.memory import measure_alone
from runtime.measuring.pinning import pinned
from runtime.model_dir import model_bytes, why_not_buildable
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.targets import find_target
from runtime.verification.report import ParityReport

KEEPS = (8, 6, 4, 2, 1)
STEPS = len(KEEPS) + 4
"""That are said: calibrate, export, one for each of `KEEPS`, the one that is trained again, bench."""
CRITERION = "gate-mass"
"""It keeps most of this model's accuracy on the calibration images; benchmarks/criteria.md compares all of them."""
RECOVERED = 2
"""So many experts a layer has the variant that is trained after it was pruned."""
TARGETS = ("rtx-ampere", "rtx-ada", "rtx-blackwell")
"""One engine runs on all of them."""
CPU = "onnxruntime-cpu"
BATCHES = (1, 64)
THREADS = 1
REPEATS, WARMUP = 30, 3
TRAINED, OPTIMIZED, RTX, ENGINE = f"keep-{RECOVERED}-recovered", "optimized", "rtx", "engine"
"""Directories; ``rtx`` has the graph that the engine is built from, where that is another one."""
RECIPE = dataclasses.replace(RECIPES["adamw"], steps=100, batch_size=64, learning_rate=1e-3)
"""A few seconds, on the images that the experts were ranked by."""

Step = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        model: what ran.
        experts: a layer.
        accuracy: on the test images, 0 to 1.
        parity: ``PASS`` against the original with the dropped experts unselectable; ``reference`` for torch itself.
        flips: tokens whose experts differ from the reference's, over all layers.
        onnx_bytes: of the graph and its weights.
        engine_bytes: of the engine that runs on all targets.
        latency_ms: median by batch size, one thread.
    """

    model: str
    experts: int
    accuracy: float
    parity: str
    flips: int | None
    onnx_bytes: int | None
    engine_bytes: int | None
    latency_ms: Mapping[str, float]


class Journey:
    """Runs the demo in ``directory``; ``say`` hears of every step."""

    def __init__(self, directory: Path, targets: tuple[str, ...], say: Step) -> None:
        self._directory = directory
        self._folders: list[Path] = []
        self._targets = targets
        self._say = say
        self._checkpoint = fashion_mnist()
        self._model = load_model(self._checkpoint)
        self._runner = OnnxRuntimeRunner(threads=THREADS)
        self._test = load_dataset(self._checkpoint / "test.npz", self._checkpoint)

    def run(self) -> list[Row]:
        """Every step; the rows of the table, torch first.

        Raises:
            VerificationError: a variant does not compute what it should.
        """
        with _torch_threads(THREADS):
            self._say("calibrate on 1,000 training images")
            statistics = self._directory / "statistics.safetensors"
            calibrate(self._checkpoint, self._checkpoint / "calibration.npz", statistics)
            self._say("export to ONNX and compare with torch")
            exported = self._directory / "exported"
            export(self._checkpoint, exported, self._runner)
            rows = [*(self._variant(keep, statistics, exported) for keep in KEEPS), self._recovered()]
            self._say(f"bench, batch sizes {', '.join(map(str, BATCHES))}")
            return self._with_latency([self._torch_row(), *rows])

    @property
    def _and_build(self) -> str:
        return ", build" if self._targets else ""

    def _torch_row(self) -> Row:
        logits = np.concatenate([self._run_torch(batch) for batch in self._test.batches(BATCHES[-1])])
        assert self._test.labels is not None
        accuracy = float((logits.argmax(-1) == self._test.labels).mean())
        return Row("torch", max(KEEPS), accuracy, "reference", None, None, None, {})

    def _run_torch(self, feeds: Feeds) -> npt.NDArray[Any]:
        """Logits as transformers computes them by default: with the experts implementation that it chose itself."""
        with torch.inference_mode():
            output = self._model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        logits: npt.NDArray[Any] = output.logits.numpy()
        return logits

    def _variant(self, keep: int, statistics: Path, exported: Path) -> Row:
        """Plan, optimise, verify and build one number of experts."""
        folder = self._folder(f"keep-{keep}")
        self._say(f"keep {keep} of {max(KEEPS)} experts: plan, optimise, verify{self._and_build}")
        options = PlanOptions(keep=keep, criterion=CRITERION, clamp_top_k=True)
        made = plan(statistics, options, folder / "plan.json")
        return self._row(folder, exported, made)

    def _recovered(self) -> Row:
        """What pruning cost comes back: the pruned checkpoint learns the images that its experts were ranked by."""
        folder = self._folder(TRAINED)
        self._say(f"train what {RECOVERED} experts can do: prune, finetune, export, optimise, verify{self._and_build}")
        prune(self._checkpoint, self._directory / f"keep-{RECOVERED}" / "plan.json", folder / "pruned")
        data = self._checkpoint / "calibration.npz"
        finetune(folder / "pruned", data, Plain(), RECIPE, folder / "checkpoint")
        exported = folder / "exported"
        export(folder / "checkpoint", exported, self._runner)
        return dataclasses.replace(self._row(folder, exported, None), model="ONNX, tuned")

    def _folder(self, name: str) -> Path:
        folder = self._directory / name
        folder.mkdir()
        self._folders.append(folder)
        return folder

    def _row(self, folder: Path, exported: Path, made: PruningPlan | None) -> Row:
        """Optimise ``exported`` into ``folder``, verify the result, and build an engine."""
        optimized, report = self._proven(exported, folder / OPTIMIZED, made, CPU, folder / "parity.json")
        assert report.accuracy is not None
        forms = "+".join(sorted({block.form for block in optimized.blocks}))
        return Row(
            model=f"ONNX, {forms}",
            experts=optimized.blocks[0].experts,
            accuracy=report.accuracy.candidate,
            parity="PASS",
            flips=report.flips,
            onnx_bytes=model_bytes(folder / OPTIMIZED),
            engine_bytes=self._engine(exported, folder, made) if self._targets else None,
            latency_ms={},
        )

    def _proven(
        self, exported: Path, out: Path, made: PruningPlan | None, target: str, parity: Path
    ) -> tuple[Manifest, ParityReport]:
        """Optimise for ``target``, and compare with ``exported`` on the test images."""
        accepted = [form for form in WRITERS if form in find_target(target).forms]
        manifest = optimize(exported, out, self._runner, plan=made, accepted=accepted)
        report = judge(out, exported, data=self._test, threads=THREADS)
        report.save(parity)
        if not report.passed:
            raise VerificationError(f"{out.parent.name}/{out.name}: {'; '.join(report.reasons)}")
        return manifest, report

    def _engine(self, exported: Path, folder: Path, made: PruningPlan | None) -> int:
        """Bytes of one engine for all targets; built, not run: this needs no GPU."""
        first, *others = map(find_target, self._targets)
        source = folder / OPTIMIZED
        if why_not_buildable(source, first):  # a form that is quick on a CPU, and that TensorRT does not take
            source = folder / RTX
            self._proven(exported, source, made, first.name, folder / "parity-rtx.json")
        build(source, first, BuildOptions(also=tuple(others)), folder / ENGINE)
        return model_bytes(folder / ENGINE)

    def _with_latency(self, rows: list[Row]) -> list[Row]:
        """All variants take turns at every batch size, so that noise hits all alike; bench.json has what came of it."""
        latency: list[dict[str, float]] = [{} for _ in rows]
        measured: list[BenchRow] = []
        with contextlib.ExitStack() as stack:
            cores = stack.enter_context(pinned(THREADS))
            sessions = [stack.enter_context(open_session(folder / OPTIMIZED, THREADS)) for folder in self._folders]
            for size in BATCHES:
                feeds = self._test.first(size).feeds
                runs: dict[str, Callable[[], object]] = {"0": partial(self._run_torch, feeds)}
                runs |= {str(index): partial(session.run, feeds) for index, session in enumerate(sessions, start=1)}
                times = time_in_turns(runs, repeats=REPEATS, warmup=WARMUP)
                for index, found in enumerate(latency):
                    found[str(size)] = float(np.median(times[str(index)]))
                measured += [self._cost(index, size, times[str(index + 1)]) for index in range(len(self._folders))]
        self._save_costs(measured, cores)
        return [dataclasses.replace(row, latency_ms=found) for row, found in zip(rows, latency, strict=True)]

    def _cost(self, index: int, size: int, times: Sequence[float]) -> BenchRow:
        """Of a variant: ``times`` beside the others, memory in a process of its own."""
        model = self._folders[index] / OPTIMIZED
        alone = measure_alone(model, size, other=1, past=0, threads=THREADS)
        return row_of(self._below(model), size, times, alone, model_bytes(model))

    def _below(self, path: Path) -> str:
        return path.relative_to(self._directory).as_posix()

    def _save_costs(self, rows: Iterable[BenchRow], cores: Iterable[int]) -> None:
        models = (folder / OPTIMIZED for folder in self._folders)
        hashes = {self._below(model): sha256_file(model / FILE_NAME) for model in models}
        by_model = sorted(rows, key=lambda row: list(hashes).index(row.model))
        report = BenchReport(tuple(by_model), hashes, describe_machine(), THREADS, tuple(cores))
        report.save(self._directory / "bench.json")


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Within the block torch uses ``count`` threads for one operator; a tiny model gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
