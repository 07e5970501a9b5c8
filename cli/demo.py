"""Go the whole way with a small model that is in the package.

It is a V-MoE trained on Fashion-MNIST, with 8 experts a layer: calibrate, plan, export, optimize, build, verify, bench
and report, for 8, 6, 4, 2 and 1 of them, and once more for 2 that are trained again. Every artifact stays in the
directory, with report.html, which says which of them may ship. No GPU is needed; it takes about a minute.

Example: moe-edge demo
Example: moe-edge demo --no-engines -o quick-demo/
"""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from cli import console
from cli.options import AsJson, Output

if TYPE_CHECKING:
    from cli.journey import Row

REPORT = "report.html"


def demo(
    output: Output = Path("demo-output"),
    engines: Annotated[
        bool | None,
        typer.Option(
            "--engines/--no-engines",
            help="Build a TensorRT-RTX engine of each, for RTX 30, 40 and 50. Not given: where that is installed.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go the whole way, and print a table."""
    from moe_spec.files import new_directory
    from moe_spec.record import dump

    with console.progress("loading torch"):
        from cli.journey import STEPS, Journey
        from report.report import report

    targets = () if engines is False else _targets(asked=engines is True)
    with new_directory(output) as staging, console.progress("starting", ticking=False) as tell:
        steps = itertools.count()

        def say(what: str) -> None:
            console.step(what)
            tell("the whole way", next(steps), STEPS + 1)

        rows = Journey(staging, targets, say).run()
        say("report")
        verdict = report(staging, staging / REPORT, name=output.resolve().name)
        told = {"rows": [dataclasses.asdict(row) for row in rows], "verdict": dataclasses.asdict(verdict)}
        (staging / "demo.json").write_text(dump(told) + "\n", encoding="utf-8")
    if not as_json:
        console.out.print(_table(rows))
    said = f"{verdict.headline}: {output / REPORT} says why, and every artifact is in {output}"
    console.result(said, told | {"output": str(output)}, as_json)


def _targets(*, asked: bool) -> tuple[str, ...]:
    """What engines are built for; nothing where they cannot be built, unless they were ``asked`` for.

    Raises:
        UserError: they were.
    """
    from cli.journey import TARGETS
    from moe_spec.errors import UserError
    from runtime.backends import BACKENDS
    from runtime.targets import TENSORRT_RTX, find_target

    why_not = BACKENDS[TENSORRT_RTX].why_not_here(find_target(TARGETS[0]))
    if not why_not:
        return TARGETS
    if asked:
        raise UserError(f"no engine can be built here: {why_not[0]}", hint="leave them out: moe-edge demo --no-engines")
    console.step(f"no engines: {why_not[0]}")
    return ()


def _table(rows: "list[Row]") -> Table:
    """80 columns wide, so that it can be piped."""
    from cli.journey import BATCHES

    table = Table(
        title="V-MoE on Fashion-MNIST: 1,000 test images, CPU latency in ms with one thread",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("model")
    latencies = (f"batch\n{size}" for size in BATCHES)
    for name in ("experts", "accuracy", "parity", "flips", "ONNX\nMB", "engine\nMB", *latencies):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            str(row.experts),
            f"{row.accuracy:.1%}",
            row.parity,
            "-" if row.flips is None else f"{row.flips}",
            _megabytes(row.onnx_bytes),
            _megabytes(row.engine_bytes),
            *(f"{row.latency_ms[str(size)]:.2f}" for size in BATCHES),
        )
    return table


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"
