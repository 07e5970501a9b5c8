"""Time models against each other: latency, throughput, memory, bytes.

They take turns, so that whatever else the machine does hits all alike. Memory and the time to open a model are measured
in a process of its own. A decoder with a cache is timed twice: on a prompt, and on one token more.

--against runs the checkpoint in torch too, in float32, on the same inputs and threads, as transformers runs it by
default. What torch.compile compiles at its first run counts as loading.

Example: moe-edge bench exported/ optimized/ --batch-size 1 --batch-size 64 -o bench.json
Example: moe-edge bench optimized/ --against torch --checkpoint checkpoint/
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.table import Table

from cli import console
from cli.options import (
    AsJson,
    Cache,
    CpuFallback,
    Parallel,
    ProviderName,
    ProviderOptions,
    Spinning,
    Threads,
    TrustRemoteCode,
    execution_of,
    written,
)
from cli.trust import warn_of_code
from moe_spec.errors import UserError

if TYPE_CHECKING:
    from cli.against import InTorch
    from runtime.bench import BenchRow
    from runtime.bench_report import BenchReport


def bench(
    models: Annotated[list[Path], typer.Argument(help="Model directories, engine directories or .onnx files.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Examples of a run; by default 1 and 64.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model at each batch size.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before the first that is timed.")] = 3,
    threads: Threads = 1,
    provider: ProviderName = None,
    provider_option: ProviderOptions = None,
    cpu_fallback: CpuFallback = False,
    parallel: Parallel = 1,
    spinning: Spinning = True,
    cache: Cache = None,
    length: Annotated[
        int, typer.Option(min=1, help="Length of dynamic axes other than the batch, such as tokens; of --data its own.")
    ] = 32,
    past: Annotated[
        int | None, typer.Option(min=0, help="Tokens in a decoder's cache when one more is timed; by default --length.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help=".npz of model inputs, or of uint8 `images`; random inputs without it.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Time the checkpoint in torch too: torch or torch.compile."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="That checkpoint; not needed for models of the one in this package.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin/--no-pin", help="Keep to as many cores as threads.")] = True,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[Path | None, written("the table, bench.json")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a table of what models cost, and write bench.json."""
    from moe_spec.dataset import load_dataset
    from moe_spec.files import refuse_existing
    from runtime.bench import bench as measure
    from runtime.bench_report import BenchReport
    from runtime.measuring.pinning import pinned

    if output is not None:
        refuse_existing(output)
    task = None if data is None else load_dataset(data, *models)
    execution = execution_of(provider, provider_option, cpu_fallback, parallel, spinning, cache)
    warn_of_code(checkpoint, trusted=trust_remote_code)
    rivals = _rivals(against or (), checkpoint, models, trust_remote_code=trust_remote_code)
    opening = console.progress(f"opening {len(models) + len(rivals)} models", ticking=False)
    with opening as tell, pinned(threads if pin else 0) as cores:
        rows = measure(
            models,
            batch_size or (1, 64),
            repeats=repeats,
            warmup=warmup,
            threads=threads,
            execution=execution,
            length=length,
            past=past,
            data=task,
            rivals=rivals,
            on_progress=tell,
        )
    notes = [] if provider is None else [f"models were computed by {execution}"]
    notes += [note for rival in rivals for note in rival.notes()]
    report = BenchReport.of(rows, threads, cores, notes)
    if output is not None:
        report.save(output)
    if as_json:
        console.result("", report.to_json(), as_json)
        return
    console.out.print(_table(rows))
    console.result("\n".join(_footer(report)), {}, as_json)


def _rivals(
    against: Sequence[str], checkpoint: Path | None, models: Sequence[Path], *, trust_remote_code: bool
) -> "list[InTorch]":
    if not against:
        if checkpoint is not None:
            raise UserError("--checkpoint is for --against", hint="add --against torch")
        return []
    from cli.against import in_torch

    return in_torch(against, checkpoint, models, trust_remote_code=trust_remote_code)


def _table(rows: "Sequence[BenchRow]") -> Table:
    table = Table(box=rich.box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("model", overflow="fold")
    all_read = all(row.tokens_per_second is not None for row in rows)
    speed = "tokens/s" if all_read else "examples/s"
    for name in ("batch", "p50 ms", "p99 ms", speed, "load ms", "MiB", "file MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(f"{row.model} {row.phase}".rstrip(), *_cells(row, in_tokens=all_read))
    return table


def _footer(report: "BenchReport") -> Iterator[str]:
    on = ", ".join(map(str, report.cores)) or "any"
    yield f"{report.machine}; threads: {report.threads or 'one a core'}, on cores: {on}"
    yield from (f"  note: {note}" for note in report.notes)


def _cells(row: "BenchRow", *, in_tokens: bool) -> tuple[str, ...]:
    times = (f"{value:.3f}" for value in (row.median_ms, row.p99_ms))
    speed = row.tokens_per_second if in_tokens else row.examples_per_second
    memory = console.mebibytes(row.memory_bytes)
    return (str(row.batch_size), *times, f"{speed:,.0f}", f"{row.load_ms:.0f}", memory, f"{row.file_bytes / 1e6:.2f}")
