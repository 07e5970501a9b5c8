"""Write one HTML page of a run's artifacts: may the pruned model ship?

The page has the verdict and its reasons; every variant with accuracy, parity, size and latency; which experts stay;
memory against each target's; hashes from checkpoint to engine; and the commands that make it all again. It is one
file, and needs no network to be read. Everything below the directory is used; of a stage that left nothing there, the
page says the command.

Example: moe-edge report . -o report.html
Example: moe-edge report . --max-loss 2% -o strict.html
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output
from moe_spec.errors import UserError


def report(
    directory: Annotated[Path, typer.Argument(help="Where the artifacts are, at any depth.")],
    output: Output,
    max_loss: Annotated[
        str,
        typer.Option(
            metavar="SHARE", help="What a variant may lose of the unpruned model's accuracy and still ship: 1% or 0.01."
        ),
    ] = "1%",
    as_json: AsJson = False,
) -> None:
    """Write the page, and print its verdict."""
    with console.progress(f"reading {directory}") as tell:
        import vl_convert  # noqa: F401 - jinja2, which the page needs too, is in other extras as well

        from report.report import report as write

        verdict = write(directory, output, max_loss=_share(max_loss), on_progress=tell)
    summary = "\n".join([f"{verdict.headline}: {output}", *(f"  {reason}" for reason in verdict.reasons)])
    console.result(summary, dataclasses.asdict(verdict) | {"output": str(output)}, as_json)


def _share(text: str) -> float:
    """A share or percents.

    >>> _share("0.01"), _share("2%")
    (0.01, 0.02)
    """
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UserError(f"--max-loss {text!r} is no number", hint="give a share or percents: --max-loss 2%") from None
