"""How long a run of a pruned model takes on this machine: what a budget of milliseconds is measured with."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import BY_HAND, PruningPlan
from moe_spec.progress import Progress

if TYPE_CHECKING:
    from pruning.budget.cost import Measure

CPU = "onnxruntime-cpu"
BATCH_SIZE, REPEATS, WARMUP = 1, 30, 3


def measure_on_cpu(
    checkpoint: Path, target: str | None, tell: Progress, *, trust_remote_code: bool = False
) -> "Measure":
    """What times plans of ``checkpoint`` with ONNX Runtime on one thread, one example a run.

    It exports the checkpoint once, writes each plan in the form that ``optimize --target onnxruntime-cpu`` chooses, not
    proven, and lets all take turns on random inputs, as ``bench`` does. ``tell`` hears what it is at.

    Raises:
        UserError: ``target`` is another than this machine's CPU.
    """
    from exporter.export import export
    from graph_passes.optimize import optimize
    from graph_passes.writers import WRITERS
    from runtime.bench import median_latencies
    from runtime.onnxruntime.backend import OnnxRuntimeRunner
    from runtime.targets import find_target

    cpu = find_target(CPU)
    if target not in (None, cpu.name, *cpu.aliases):
        raise UserError(
            f"--max-latency is measured here, with ONNX Runtime on the CPU, which says nothing of target {target}",
            hint="leave out --target, or plan with --max-size",
        )

    def measure(plans: Mapping[int, Sequence[LayerPlan]]) -> dict[int, float]:
        accepted, runner = [name for name in WRITERS if name in cpu.forms], OnnxRuntimeRunner()
        with tempfile.TemporaryDirectory() as scratch:
            tell(f"exporting {checkpoint}")
            exported = Path(scratch) / "exported"
            source = export(checkpoint, exported, runner, trust_remote_code=trust_remote_code).source_sha256
            for count, layers in plans.items():
                tell(f"writing it with {count} experts a layer")
                plan = PruningPlan(source, BY_HAND, tuple(layers))
                optimize(exported, Path(scratch) / str(count), runner, plan=plan, accepted=accepted, prove=False)
            tell("timing these")
            models = [Path(scratch) / str(count) for count in plans]
            times = median_latencies(models, BATCH_SIZE, repeats=REPEATS, warmup=WARMUP)
        return dict(zip(plans, times, strict=True))

    return measure
