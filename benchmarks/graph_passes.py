"""What graph surgery costs: graphs of tens of thousands of nodes, and models larger than memory.

    python -m benchmarks.graph_passes > benchmarks/graph_passes.md

It writes models of up to 12 GB below the temporary directory (``TMPDIR``), twice as much for a while, and removes them.
With ``--quick`` the models are small, and its numbers say nothing about large ones.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import moe_edge
from benchmarks.large_models import UNROLLED, Sizes, save_large
from graph_passes.describe import read_model
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL, Manifest
from moe_spec.plan import PruningPlan
from runtime.measuring.machine import describe_machine

DEPTHS, QUICK_DEPTHS = (12, 24, 48), (1, 2)
EXPERTS, QUICK_EXPERTS = 128, 8
TOP_K, KEPT_SHARE = 2, 2
NODE_SECONDS = 60
LARGE = Sizes(layers=48, experts=128, top_k=TOP_K, hidden=512, width=320)
QUICK_LARGE = Sizes(layers=2, experts=16, top_k=TOP_K, hidden=128, width=64)
LARGE_FORM, WRITTEN_FORM = "grouped", "sorted"
ROUNDS, QUICK_ROUNDS = 3, 1
GOOD_ENOUGH = 2.0
MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run of ``moe-edge optimize``: wall time, peak resident memory, and what it read and wrote."""

    seconds: float
    peak_bytes: int
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class NodesRow:
    """A graph of many nodes."""

    form: str
    layers: int
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Round:
    """A model of many bytes: pruned by us, and its kept bytes copied by ``cp``, both until they are on disk."""

    cost: Cost
    cp_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as long as ``cp`` of the kept bytes it takes."""
        return self.cost.seconds / self.cp_seconds


def measure_nodes(form: str, layers: int, experts: int) -> NodesRow:
    """Half of the experts of a model of tiny experts deleted: the time is that of the nodes."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / MODEL
        save_large(form, Sizes(layers, experts, TOP_K, hidden=16, width=8), source)
        return NodesRow(form, layers, prune(source, Path(scratch) / "out"))


def measure_bytes(sizes: Sizes, rounds: int) -> list[Round]:
    """Half of the experts of a model of large experts deleted, beside ``cp`` of as many bytes, by turns."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / MODEL
        save_large(LARGE_FORM, sizes, source)
        return [_take_turns(source, Path(scratch) / "out", Path(scratch) / "copy") for _ in range(rounds)]


def _take_turns(source: Path, out: Path, copy: Path) -> Round:
    os.sync()
    _read_once(source.with_name(f"{MODEL}.data"))  # so that both find what they read in memory
    cost = prune(source, out)
    started = time.perf_counter()
    subprocess.run(["cp", out / f"{MODEL}.data", copy], check=True)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    copy.unlink()
    return Round(cost, seconds)


def _read_once(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(MEGABYTE):
            pass


def prune(source: Path, out: Path) -> Cost:
    """Every second expert deleted by the command, in a process of its own, until what it wrote is on disk.

    Raises:
        RuntimeError: the command failed.
    """
    plan = source.with_name("plan.json")
    halve(source).save(plan)
    usage = moe_edge("optimize", source, "--plan", plan, "--no-prove", "--form", WRITTEN_FORM, "-o", out)
    passes = Manifest.load(out).passes
    first, last = passes[0], passes[-1]
    sizes = (first.nodes_before, last.nodes_after, first.bytes_before, last.bytes_after)
    return Cost(usage.seconds, usage.peak_bytes, *sizes)


def halve(source: Path) -> PruningPlan:
    """A plan that keeps every second expert."""
    model = read_model(source)
    layers = tuple(
        LayerPlan(block.name, block.num_experts, block.router.top_k, tuple(range(0, block.num_experts, KEPT_SHARE)))
        for block in model.blocks
    )
    return PruningPlan(model.source_sha256, "every second expert", layers)


def report(nodes: Sequence[NodesRow], rounds: Sequence[Round], experts: int, command: str) -> str:
    """The whole document."""
    middle = statistics.median(one.ratio for one in rounds)
    slowest = max(nodes, key=lambda row: row.cost.seconds)
    verdict = "within" if slowest.cost.seconds < NODE_SECONDS else "NOT within"
    return f"""# What graph surgery costs

`{command}` printed this on {describe_machine()}.

Each number is one run of `moe-edge optimize --plan ... --form {WRITTEN_FORM} --no-prove` as a process of its own,
from start to files on disk; the plan keeps every second expert. Without the proof, because ONNX Runtime would hold
the model in memory. What the written forms cost when they run stands in [forms.md](forms.md).

## Many nodes

Layers of {experts} tiny experts in the forms whose graphs grow with the experts. Linear growth is a factor of 1 in the
last column: time per node against that of the fewest layers in the same form.

{_nodes_table(nodes)}

The slowest, {slowest.form} with {slowest.layers} layers, took {slowest.cost.seconds:.1f} s: {verdict} {NODE_SECONDS} s.

## Many bytes

Form `{LARGE_FORM}`, weights in one external data file. Before each round the model is read once, so that both find what
they read in the page cache; `optimize` also hashes all of the model and what it writes, `cp` hashes nothing.

{_bytes_table(rounds)}

The median is {middle:.2f} times as long as `cp` (aim: below {GOOD_ENOUGH:g})."""


def _nodes_table(rows: Sequence[NodesRow]) -> str:
    first = {row.form: row for row in reversed(rows)}
    lines = [("form", "layers", "nodes", "after", "seconds", "peak MB", "time per node"), ("---", *("---:",) * 6)]
    for row in rows:
        cost, base = row.cost, first[row.form].cost
        factor = (cost.seconds / cost.nodes_before) / (base.seconds / base.nodes_before)
        numbers = (f"{cost.nodes_before:,}", f"{cost.nodes_after:,}", f"{cost.seconds:.1f}")
        lines.append((row.form, str(row.layers), *numbers, f"{cost.peak_bytes / MEGABYTE:.0f}", f"{factor:.2f}"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _bytes_table(rounds: Sequence[Round]) -> str:
    lines = [("model", "kept", "pruned in", "cp of the kept bytes", "ratio", "peak memory"), ("---:",) * 6]
    for one in rounds:
        sizes = (f"{one.cost.bytes_before / 1e9:.1f} GB", f"{one.cost.bytes_after / 1e9:.1f} GB")
        times = (f"{one.cost.seconds:.1f} s", f"{one.cp_seconds:.1f} s", f"{one.ratio:.2f}")
        lines.append((*sizes, *times, f"{one.cost.peak_bytes / MEGABYTE:.0f} MB"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Measure and print the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models")
    quick = parser.parse_args().quick
    depths, experts = (QUICK_DEPTHS, QUICK_EXPERTS) if quick else (DEPTHS, EXPERTS)
    rows = []
    for form in UNROLLED:
        for layers in depths:
            print(f"{form}, {layers} layers", file=sys.stderr)
            rows.append(measure_nodes(form, layers, experts))
    print("many bytes", file=sys.stderr)
    rounds = measure_bytes(QUICK_LARGE if quick else LARGE, QUICK_ROUNDS if quick else ROUNDS)
    print(report(rows, rounds, experts, f"python -m benchmarks.graph_passes{' --quick' if quick else ''}"))


if __name__ == "__main__":
    main()
