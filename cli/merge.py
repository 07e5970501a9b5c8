"""Add up the statistics of several shards of data: what one calibration over all of it would have given.

Example: moe-edge merge monday.safetensors tuesday.safetensors -o statistics.safetensors
"""

from functools import reduce
from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.calibrate import report
from cli.options import AsJson, Output
from moe_spec.progress import counted


def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="STATISTICS...", help="Written by calibrate for one and the same model.")
    ],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write statistics.safetensors."""
    from moe_spec.files import refuse_existing
    from moe_spec.statistics import Statistics
    from moe_spec.statistics import merge as merge_two

    refuse_existing(output)
    with console.progress("reading statistics") as tell:
        each = counted(sources, "adding up statistics", len(sources), tell)
        statistics = reduce(merge_two, map(Statistics.load, each))
    statistics.save(output)
    report(output, statistics, as_json)
