"""Time models against each other: latency, throughput, memory, bytes.

The models take turns, so that what else the machine does hits all alike. Opening a model and what that takes of memory
is measured in a process of its own. Decoders with a cache are timed twice: a prompt, and a token more.

Example: moe-edge bench exported/ optimized/ --batch-size 1 --batch-size 64 -o bench.json
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.table import Table

from cli import console
from cli.options import AsJson

if TYPE_CHECKING:
    from runtime.bench import BenchRow


def bench(
    models: Annotated[list[Path], typer.Argument(help="Engine directories, model directories or .onnx files.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Examples a run; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model at each batch size.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before the first that is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="Threads of one operator; 0: one a core.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Length of dynamic axes other than the batch.")] = 32,
    past: Annotated[
        int | None, typer.Option(min=0, help="Tokens in a decoder's cache when one more is timed; by default --length.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help=".npz to feed; random feeds without it.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="bench.json; it must not exist yet.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time models against each other: latency, throughput, memory, bytes.

    Example: moe-edge bench exported/ optimized/ --batch-size 1 --batch-size 64
    """
    from moe_spec.dataset import load_dataset
    from moe_spec.files import refuse_existing
    from moe_spec.images import ImagePreprocessor
    from runtime.bench import bench as measure
    from runtime.bench_report import BenchReport

    if output is not None:
        refuse_existing(output)
    task = None if data is None else load_dataset(data, ImagePreprocessor.load(models[0]))
    with console.status(f"timing {len(models)} models"):
        rows = measure(
            models,
            batch_size or (1, 64),
            repeats=repeats,
            warmup=warmup,
            threads=threads,
            length=length,
            past=past,
            data=task,
        )
    if output is not None:
        BenchReport.of(rows).save(output)
    table = Table(box=rich.box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("model", overflow="fold")
    all_read = all(row.tokens_per_second is not None for row in rows)
    speed = "tokens/s" if all_read else "examples/s"
    for name in ("batch", "p50 ms", "p99 ms", speed, "load ms", "MiB", "file MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(f"{row.model} {row.phase}".rstrip(), *_cells(row, in_tokens=all_read))
    if as_json:
        console.result("", {"rows": [dataclasses.asdict(row) for row in rows]}, as_json)
    else:
        console.out.print(table)


def _cells(row: "BenchRow", *, in_tokens: bool) -> tuple[str, ...]:
    times = (f"{value:.3f}" for value in (row.median_ms, row.p99_ms))
    speed = row.tokens_per_second if in_tokens else row.examples_per_second
    memory = console.mebibytes(row.memory_bytes)
    return (str(row.batch_size), *times, f"{speed:,.0f}", f"{row.load_ms:.0f}", memory, f"{row.file_bytes / 1e6:.2f}")
