"""Say which families of transformers' models work, and why others do not.

A family is what config.json calls model_type. Each was tried as a tiny model with random weights, stage by stage: read,
calibrated, pruned, exported, pruned in ONNX, with a KV cache, built by TensorRT-RTX.

Example: moe-edge families
Example: moe-edge families deepseek_v3
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import rich.box
import typer
from rich.table import Table

from cli import console
from cli.options import AsJson
from models import support
from models.support import STAGES, Support

WORKS, FAILS = "x", "-"


def families(
    family: Annotated[str | None, typer.Argument(help="A model_type; all families without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the table of families, or all about one."""
    if family is not None:
        (row,) = support.families(family)
        console.result(_details(row), _json(row), as_json)
        return
    rows = support.families()
    console.result(_summary(rows), {row.model_type: _json(row) for row in rows}, as_json)
    if not as_json:
        console.out.print(_table(rows))


def _summary(rows: Sequence[Support]) -> str:
    counts = [f"{sum(row.reason(stage) is None for row in rows)} {stage}" for stage in STAGES]
    versions = ", ".join(f"{name} {version}" for name, version in support.tools().items())
    return f"{len(rows)} families: {', '.join(counts)}\nmade with {versions}; moe-edge families FAMILY says why not"


def _table(rows: Sequence[Support]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, padding=0)
    table.add_column("family", no_wrap=True)
    for stage in STAGES:
        words = stage.replace("-", "- ").split()  # of which 80 columns hold each
        table.add_column("\n".join(words), justify="center", min_width=max(map(len, words)))
    for row in rows:
        table.add_row(row.model_type, *(WORKS if row.reason(stage) is None else FAILS for stage in STAGES))
    return table


def _details(row: Support) -> str:
    lines = [f"{row.model_type}: {row.model or 'no model was made'}"]
    for stage, meaning in STAGES.items():
        why_not = row.reason(stage)
        lines.append(f"  {stage}: {'yes, ' + meaning if why_not is None else 'no, ' + why_not}")
    return "\n".join(lines)


def _json(row: Support) -> Mapping[str, str | None]:
    """The reason of every stage that is not proven; null where it is."""
    return {stage: row.reason(stage) for stage in STAGES}
