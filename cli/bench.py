"""Time models against each other: latency, throughput, memory, bytes.

The models take turns, so that what else the machine does hits all alike.

Example: moe-edge bench exported/ optimized/ --batch-size 1 --batch-size 64
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import rich.box
import typer
from rich.table import Table

from cli import console
from cli.options import AsJson


def bench(
    models: Annotated[list[Path], typer.Argument(help="Engine directories, model directories or .onnx files.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Examples a run; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model at each batch size.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before the first that is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="Threads of one operator; 0: one a core.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Length of dynamic axes other than the batch.")] = 32,
    past: Annotated[int, typer.Option(min=0, help="Tokens in the cache of decoders that have one.")] = 0,
    data: Annotated[Path | None, typer.Option(help=".npz to feed; random feeds without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time models against each other: latency, throughput, memory, bytes.

    Example: moe-edge bench exported/ optimized/ --batch-size 1 --batch-size 64
    """
    from moe_spec.dataset import load_dataset
    from moe_spec.images import ImagePreprocessor
    from runtime.bench import bench as measure

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
    table = Table(box=rich.box.SIMPLE)
    table.add_column("model", overflow="fold")
    for name in ("batch", "median ms", "p90 ms", "examples/s", "MiB RAM", "file bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        memory = "-" if row.memory_bytes is None else f"{row.memory_bytes / (1 << 20):.1f}"
        times = (f"{row.median_ms:.3f}", f"{row.p90_ms:.3f}", f"{row.examples_per_second:,.0f}")
        table.add_row(row.model, str(row.batch_size), *times, memory, f"{row.file_bytes:,}")
    if as_json:
        console.result("", {"rows": [dataclasses.asdict(row) for row in rows]}, as_json)
    else:
        console.out.print(table)
