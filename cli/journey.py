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

from exporter.export import export
from graph_passes.optimize import optimize
from graph_passes.proof.mask import mask_model
from graph_passes.writers import WRITERS
from models.checkpoints import load_model
from models.vmoe.assets import fashion_mnist
from moe_spec.dataset import load_dataset
from moe_spec.errors import VerificationError
from moe_spec.files import sha256_file
from moe_spec.images import ImagePreprocessor
from moe_spec.manifest import FILE_NAME, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import Feeds
from pruning.calibrate import calibrate
from pruning.finetuning.finetune import finetune
from pruning.finetuning.options import TaskSpecific
from pruning.finetuning.recipe import RECIPES
from pruning.options import PlanOptions
from pruning.plan import plan
from runtime.backend import BuildOptions
from runtime.backends import open_session
from runtime.bench import BenchRow, row_of, time_in_turns
from runtime.bench_report import BenchReport
from runtime.build import build
from runtime.measuring.machine import describe_machine
from runtime.measuring.memory import measure_alone
from runtime.model_dir import model_bytes
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.targets import find_target
from runtime.verify import verify

KEEPS = (8, 4, 2, 1)
CRITERION = "gate-mass"
"""It keeps most of this model's accuracy on the calibration images; benchmarks/criteria.md compares all of them."""
TARGETS = ("rtx-ampere", "rtx-ada", "rtx-blackwell")
CPU = "onnxruntime-cpu"
BATCHES = (1, 64)
THREADS = 1
REPEATS, WARMUP = 30, 3
TRAINED, OPTIMIZED = "one-expert", "optimized"
"""Directories."""
RECIPE = dataclasses.replace(RECIPES["adamw"], steps=100, batch_size=64, learning_rate=1e-3)
"""Half a minute at most. Longer training, on all training images, is what the paper of the method does."""

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
        engine_bytes: by target.
        latency_ms: median by batch size, one thread.
    """

    model: str
    experts: int
    accuracy: float
    parity: str
    flips: int | None
    onnx_bytes: int | None
    engine_bytes: Mapping[str, int]
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
        self._test = load_dataset(self._checkpoint / "test.npz", ImagePreprocessor.load(self._checkpoint))

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
            rows = [*(self._variant(keep, statistics, exported) for keep in KEEPS), self._trained()]
            self._say(f"bench, batch sizes {', '.join(map(str, BATCHES))}")
            return self._with_latency([self._torch_row(), *rows])

    def _torch_row(self) -> Row:
        logits = np.concatenate([self._run_torch(batch) for batch in self._test.batches(BATCHES[-1])])
        assert self._test.labels is not None
        accuracy = float((logits.argmax(-1) == self._test.labels).mean())
        return Row("torch", max(KEEPS), accuracy, "reference", None, None, {}, {})

    def _run_torch(self, feeds: Feeds) -> npt.NDArray[Any]:
        """Logits as transformers computes them by default: with the experts implementation that it chose itself."""
        with torch.inference_mode():
            output = self._model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        logits: npt.NDArray[Any] = output.logits.numpy()
        return logits

    def _variant(self, keep: int, statistics: Path, exported: Path) -> Row:
        """Plan, optimise, verify and build one number of experts."""
        folder = self._folder(f"keep-{keep}")
        self._say(f"keep {keep} of {max(KEEPS)} experts: plan, optimise, verify")
        options = PlanOptions(keep=keep, criterion=CRITERION, clamp_top_k=True)
        made = plan(statistics, options, folder / "plan.json")
        return self._row(folder, exported, made)

    def _trained(self) -> Row:
        """Task-specific pruning: experts go while the calibration images are learned, until one a layer is left."""
        folder = self._folder(TRAINED)
        self._say(f"train to 1 of {max(KEEPS)} experts on the calibration images: export, optimise, verify")
        data = self._checkpoint / "calibration.npz"
        finetune(self._checkpoint, data, TaskSpecific(), RECIPE, folder / "checkpoint")
        exported = folder / "exported"
        export(folder / "checkpoint", exported, self._runner)
        return dataclasses.replace(self._row(folder, exported, None), model="ONNX, tuned")

    def _folder(self, name: str) -> Path:
        folder = self._directory / name
        folder.mkdir()
        self._folders.append(folder)
        return folder

    def _row(self, folder: Path, exported: Path, made: PruningPlan | None) -> Row:
        """Optimise ``exported`` into ``folder``, verify the result, and build its engines."""
        mask_model(exported, made, folder / "reference")
        optimized = self._optimize(exported, folder / OPTIMIZED, made, CPU)
        report = verify(folder / OPTIMIZED, folder / "reference", self._test, threads=THREADS)
        report.save(folder / "parity.json")
        if not report.passed or report.accuracy is None:
            raise VerificationError(f"{folder.name}: {'; '.join(report.reasons)}")
        forms = "+".join(sorted({block.form for block in optimized.blocks}))
        return Row(
            model=f"ONNX, {forms}",
            experts=optimized.blocks[0].experts,
            accuracy=report.accuracy.candidate,
            parity="PASS",
            flips=report.flips,
            onnx_bytes=model_bytes(folder / OPTIMIZED),
            engine_bytes=self._engines(exported, folder, made),
            latency_ms={},
        )

    def _optimize(self, exported: Path, out: Path, made: PruningPlan | None, target: str) -> Manifest:
        accepted = [form for form in WRITERS if form in find_target(target).forms]
        return optimize(exported, out, self._runner, plan=made, accepted=accepted)

    def _engines(self, exported: Path, folder: Path, made: PruningPlan | None) -> dict[str, int]:
        """Engines of the form that TensorRT takes; built, not run: this needs no GPU."""
        if not self._targets:
            return {}
        self._optimize(exported, folder / "optimized-rtx", made, self._targets[0])
        sizes = {}
        for target in self._targets:
            self._say(f"{folder.name}: build the engine for {target}")
            build(folder / "optimized-rtx", find_target(target), BuildOptions(), folder / f"engine-{target}")
            sizes[target] = model_bytes(folder / f"engine-{target}")
        return sizes

    def _with_latency(self, rows: list[Row]) -> list[Row]:
        """All variants take turns at every batch size, so that noise hits all alike; bench.json has what came of it."""
        latency: list[dict[str, float]] = [{} for _ in rows]
        measured: list[BenchRow] = []
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(open_session(folder / OPTIMIZED, THREADS)) for folder in self._folders]
            for size in BATCHES:
                feeds = self._test.first(size).feeds
                runs: dict[str, Callable[[], object]] = {"0": partial(self._run_torch, feeds)}
                runs |= {str(index): partial(session.run, feeds) for index, session in enumerate(sessions, start=1)}
                times = time_in_turns(runs, repeats=REPEATS, warmup=WARMUP)
                for index, found in enumerate(latency):
                    found[str(size)] = float(np.median(times[str(index)]))
                measured += [self._cost(index, size, times[str(index + 1)]) for index in range(len(self._folders))]
        self._save_costs(measured)
        return [dataclasses.replace(row, latency_ms=found) for row, found in zip(rows, latency, strict=True)]

    def _cost(self, index: int, size: int, times: Sequence[float]) -> BenchRow:
        """Of a variant: ``times`` beside the others, memory in a process of its own."""
        model = self._folders[index] / OPTIMIZED
        alone = measure_alone(model, size, other=1, past=0, threads=THREADS)
        return row_of(self._below(model), size, times, alone, model_bytes(model))

    def _below(self, path: Path) -> str:
        return path.relative_to(self._directory).as_posix()

    def _save_costs(self, rows: Iterable[BenchRow]) -> None:
        models = (folder / OPTIMIZED for folder in self._folders)
        hashes = {self._below(model): sha256_file(model / FILE_NAME) for model in models}
        by_model = sorted(rows, key=lambda row: list(hashes).index(row.model))
        BenchReport(tuple(by_model), hashes, describe_machine(), THREADS).save(self._directory / "bench.json")


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Within the block torch uses ``count`` threads for one operator; a tiny model gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
