"""Task-specific dropping leaves a dense model that is as good, and twice as fast, https://arxiv.org/abs/2206.00277."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.claims.claim import Claim, Finding, Outcome, Scores
from benchmarks.claims.flops import Flops, count_flops
from benchmarks.claims.lab import VERSION, noted, score, tuned
from benchmarks.claims.router_norm import LEARN
from benchmarks.claims.subjects import turned
from benchmarks.markdown import table
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Report
from exporter.export import export
from graph_passes.optimize import optimize
from graph_passes.writers import WRITERS
from models.checkpoints import load_model
from moe_spec.identity import checkpoint_sha256
from moe_spec.record import Json
from pruning.finetuning.options import Plain, TaskSpecific
from pruning.inputs import tensors_of
from runtime.bench import bench
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.targets import find_target

KEPT, SPEED_UP = 0.993, 2.0
BATCHES, REPEATS, THREADS = (1, 64), 200, 1
TARGET = "onnxruntime-cpu"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same training twice: with all experts, and down to one a layer."""

    moe: Task
    dense: Task


def measure(seeds: int, report: Report) -> Outcome:
    """On images that the embedded model has to learn first. A pair of models is timed: all have the same shapes."""
    task, pairs = turned(), []
    for seed in range(seeds):
        report(f"one expert: seed {seed}")
        recipe = dataclasses.replace(LEARN, seed=seed)
        pairs.append(Pair(tuned(task, Plain(), recipe), tuned(task, TaskSpecific(), recipe)))
    moe = Scores(task.metric, [score(pair.moe) for pair in pairs])
    dense = Scores(task.metric, [score(pair.dense) for pair in pairs])
    report("one expert: timing")
    times = speed_up(pairs[0])
    row = (str(moe), str(dense), f"{dense.mean / moe.mean:.1%}", *map("{:.2f}".format, times.values()))
    head = ("all experts", "one a layer", "kept", *(f"times as fast, batch {size}" for size in times), "fewer FLOPs")
    return Outcome({task.name: judge(moe, dense, times)}, table(head, [(*row, f"{work_saved(pairs[0]):.0%}")], left=0))


def judge(moe: Scores, dense: Scores, times: Mapping[int, float]) -> Finding:
    """The rule of the claim: accuracy kept, and quick at every batch size."""
    kept = dense.mean / moe.mean
    quick = " and ".join(f"{ratio:.2f} times as fast at batch {size}" for size, ratio in times.items())
    ours = f"{kept:.1%} kept ({dense} of {moe}), {quick}"
    return Finding(ours, kept >= KEPT and min(times.values()) >= SPEED_UP)


def speed_up(pair: Pair) -> Mapping[int, float]:
    """How many times as fast the dense model is in ONNX Runtime, by batch size; timed once."""

    def make() -> Json:
        with tempfile.TemporaryDirectory() as scratch:
            models = [
                optimized(task, Path(scratch) / name) for name, task in (("moe", pair.moe), ("dense", pair.dense))
            ]
            rows = bench(models, BATCHES, repeats=REPEATS, threads=THREADS)
        return {f"{row.batch_size} {Path(row.model).parent.name}": row.median_ms for row in rows}

    names = [field.name for field in dataclasses.fields(pair)]
    models = {name: checkpoint_sha256(getattr(pair, name).checkpoint) for name in names}
    times = noted("speed", models | {"batches": BATCHES, "repeats": REPEATS, "version": VERSION}, make)
    return {size: times[f"{size} moe"] / times[f"{size} dense"] for size in BATCHES}


def optimized(task: Task, directory: Path) -> Path:
    """The task's model as ``moe-edge export`` and ``optimize --target onnxruntime-cpu`` make it."""
    accepted = [form for form in WRITERS if form in find_target(TARGET).forms]
    runner = OnnxRuntimeRunner(THREADS)
    export(task.checkpoint, directory / "exported", runner)
    optimize(directory / "exported", directory / "optimized", runner, accepted=accepted)
    return directory / "optimized"


def work_saved(pair: Pair) -> float:
    """The share of the floating-point operations of an example that the dense model does not need."""
    moe, dense = (flops_of(task) for task in (pair.moe, pair.dense))
    return dense.fewer_than(moe)


def flops_of(task: Task) -> Flops:
    """Of one test example."""
    model = load_model(task.checkpoint)
    return count_flops(model, tensors_of(task.read(task.test).first(1).feeds, model.dtype))


CLAIM = Claim(
    paper="[Chen et al.](https://arxiv.org/abs/2206.00277)",
    claimed=f"experts dropped while a task is learned, until one a layer is left: {KEPT:.1%} of what the experts bring "
    f"is kept, and {SPEED_UP:g} times as fast as with all",
    rule=f"the mean accuracy is at least {KEPT:.1%} of that of the same training without dropping, which asks for less "
    f"than as much of what the experts bring, and the model at least {SPEED_UP:g} times as fast at every batch size",
    setting=f"""The embedded V-MoE, 8 experts in every second block and K=2, learns the same images by the same
{LEARN.steps} steps of SGD, twice: plain, and with `--method task-specific` (eager, its defaults). Both results are
exported, optimised for {TARGET}, and timed in turns with {THREADS} thread, median of {REPEATS} runs; one pair is timed,
for all have its shapes. A seed is the order of the images.""",
    measure=measure,
    reason="""Accuracy comes near, measured whole: without a dense model trained alike nobody knows how much of it the
experts bring. Most of this small model is not experts, and K=2 runs two of them: one instead saves the share of FLOPs
in the last column, and the rest of what is won is routing. Twice as fast takes a model that is mostly experts, or
experts on several devices, whose communication the paper saves too.""",
)
