"""Add up the statistics of several parts of the data, as if calibrated at once.

Parts may be calibrated on different machines, all with the same model. The same part twice is refused.

Example: moe-edge merge monday.safetensors tuesday.safetensors -o week.safetensors
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
        list[Path], typer.Argument(metavar="STATISTICS", help="What calibrate wrote, for one and the same model.")
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
