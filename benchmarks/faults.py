"""What `moe-edge verify` says of models with a planted fault, and of models that were changed without harm.

    python -m benchmarks.faults > benchmarks/faults.md

It takes some four minutes. ``--quick`` looks at 64 images, and its numbers are worth no more than that.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.markdown import table
from benchmarks.planted import FAULTS, Change, plant
from cli.judge import judge
from exporter.export import export
from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from models.vmoe.assets import fashion_mnist
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from runtime.measuring.machine import describe_machine
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.verification.report import ParityReport
from tests.families.configs import tiny

THREADS, BATCH_SIZE, QUICK_EXAMPLES = 1, 64, 64
RUNNER = OnnxRuntimeRunner(THREADS)
LAYER = 1
"""The MoE layer that gets the fault, of two."""

BESIDE_INT8 = ("two experts swapped", "a scale applied twice", "an expert zeroed")
KEPT = (0, 2, 5, 7)
FORMS = ("sorted", "dense", "gather")

RANDOM = ("mixtral", "deepseek_v3")
"""Decoders with random weights, fed at random."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate: what was done to it, whether it is to fail, and what became of it."""

    model: str
    change: str
    faulty: bool
    report: ParityReport

    @property
    def right(self) -> bool:
        """Whether the verdict is what it should be, and a fault was found in the layer that it was planted in."""
        report = self.report
        if not self.faulty:
            return report.passed
        return not report.passed and report.fault is not None and report.first_wrong_layer == self.layer

    @property
    def layer(self) -> str:
        """The layer that gets faults."""
        assert self.report.layers is not None
        return self.report.layers[LAYER].name


Make = Callable[[Path], Path]
"""Writes a candidate into a new directory; gives the candidate."""


def candidates(exported: Path, half: Path | None) -> list[tuple[str, bool, Make]]:
    """What is compared with ``exported``: what was done, whether that is a fault, and how."""
    made: list[tuple[str, bool, Make]] = [
        (fault, True, functools.partial(_planted, exported, change)) for fault, change in FAULTS.items()
    ]
    made += [
        (f"{fault}, beside int8 experts", True, functools.partial(_planted_int8, exported, FAULTS[fault]))
        for fault in BESIDE_INT8
    ]
    made += [(f"form {form}", False, functools.partial(_in_form, exported, form)) for form in FORMS]
    made += [
        ("half of the experts pruned", False, functools.partial(_pruned, exported)),
        ("int8 experts", False, functools.partial(_int8, exported)),
    ]
    return made if half is None else [*made, ("fp16", False, lambda _: half)]


def _planted(source: Path, change: Change, out: Path) -> Path:
    return plant(source, out, change, LAYER)


def _planted_int8(source: Path, change: Change, out: Path) -> Path:
    return _int8(_planted(source, change, out / "float"), out / "int8")


def _in_form(source: Path, form: str, out: Path) -> Path:
    return plant(source, out, lambda block: block, LAYER, form)


def _int8(source: Path, out: Path) -> Path:
    optimize(source, out, RUNNER, form="sorted", precision=Precision("int8"))
    return out


def _pruned(source: Path, out: Path) -> Path:
    model = read_model(source)
    layers = tuple(
        LayerPlan(block.name, block.num_experts, block.router.top_k, KEPT, groups=block.router.groups)
        for block in model.blocks
    )
    plan = PruningPlan(model.model_sha256, "manual", layers)
    optimize(source, out, RUNNER, plan=plan, form="sorted")
    return out


def measure(model: str, exported: Path, half: Path | None, data: Dataset | None, scratch: Path) -> list[Row]:
    """A row for each candidate of ``exported``."""
    rows = []
    for index, (change, faulty, make) in enumerate(candidates(exported, half)):
        print(f"{model}: {change}", file=sys.stderr)
        candidate = make(scratch / f"{model}-{index}")
        report = judge(candidate, exported, data=data, batch_size=BATCH_SIZE, threads=THREADS)
        rows.append(Row(model, change, faulty, report))
    return rows


def report(rows: Sequence[Row], examples: int, command: str) -> str:
    """The whole document."""
    faulty, harmless = ([row for row in rows if row.faulty is wanted] for wanted in (True, False))
    caught, passed = (sum(row.right for row in group) for group in (faulty, harmless))
    return f"""# Faults that verify catches

`{command}` printed this on {describe_machine()}.

Each candidate is compared with the export that it was made from: the embedded V-MoE on {examples} test images, and a
Mixtral and a DeepSeek-V3 of random weights, which see random tokens. Faults are planted in the second MoE layer
(`benchmarks/planted.py`); the reference of a pruned candidate is the export with the dropped experts unselectable.

Caught, and found in that layer: **{caught} of {len(faulty)}** faults.
Passed: **{passed} of {len(harmless)}** harmless changes.

- *flips*: tokens of all layers that select other experts; *no excuse*: where rounding does not explain it.
- *elements*: largest difference of an output over its largest magnitude, on examples without flips; *forced*: on all
  examples, where the reference's routers choose; *allowed*: of either, for the candidate's number format.
- *top-1*: share of outputs whose largest entry is at the same place; *accuracy*: of the candidate, and in brackets its
  change with a 95 % confidence interval. A fault that leaves both alone is a fault all the same.

## Faults

{_table(faulty)}

{_found(faulty)}

## Harmless changes

{_table(harmless)}"""


def _table(rows: Sequence[Row]) -> str:
    head = ("model", "change", "verdict", "flips", "no excuse", "elements", "forced", "allowed", "top-1", "accuracy")
    return table(head, [_cells(row) for row in rows], left=3)


def _cells(row: Row) -> tuple[str, ...]:
    report, accuracy = row.report, row.report.accuracy
    output = next(output for output in report.outputs if output.name == "logits")
    shown = "-"
    if accuracy is not None:
        shown = f"{accuracy.candidate:.1%} ({100 * accuracy.low:+.1f} to {100 * accuracy.high:+.1f})"
    return (
        row.model,
        row.change,
        ("PASS" if report.passed else "FAIL") + ("" if row.right else " **wrong**"),
        f"{report.flips:,}",
        f"{sum(layer.faults for layer in report.layers or ()):,}",
        _number(output.max_rel),
        _number(output.forced_max_rel),
        f"{report.tolerance.element:.0e}",
        "-" if output.top1_agreement is None else f"{output.top1_agreement:.1%}",
        shown,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _found(rows: Sequence[Row]) -> str:
    """Where each fault was found, and what is said of it."""
    lines = []
    for row in rows:
        fault = row.report.fault
        lines.append((row.model, row.change, "-" if fault is None else f"{fault.place}: {fault.says}"))
    return table(("model", "change", "found"), lines, left=3)


def main() -> None:
    """Measure and print the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"look at {QUICK_EXAMPLES} images only")
    quick = parser.parse_args().quick
    checkpoint = fashion_mnist()
    data = load_dataset(checkpoint / "test.npz", checkpoint, limit=QUICK_EXAMPLES if quick else None)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        export(checkpoint, scratch / "vmoe", RUNNER)
        export(checkpoint, scratch / "half", RUNNER, dtype=torch.float16)
        rows = measure("V-MoE", scratch / "vmoe", scratch / "half", data, scratch)
        for name in RANDOM:
            tiny(name).save_pretrained(scratch / name)
            export(scratch / name, scratch / f"{name}-exported", RUNNER, cache=False)
            rows += measure(name, scratch / f"{name}-exported", None, None, scratch)
    print(report(rows, len(data), f"python -m benchmarks.faults{' --quick' if quick else ''}"))


if __name__ == "__main__":
    main()
