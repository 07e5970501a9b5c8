"""One HTML page from a directory of artifacts: may the pruned model ship?

It has the verdict, every variant with its accuracy, parity, size and latency, a map of the experts that stay, the
Pareto front, flips by margin, memory against each target's, the chain of hashes, and the commands that make it all
again. It is one file that needs no network and no server. Everything below the directory is read, and a stage that left
nothing there is named with its command. --max-loss is what a variant may lose of the unpruned model's accuracy and
still ship.

Example: moe-edge report demo-output -o report.html
Example: moe-edge report runs/ --max-loss 2% -o report.html
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
    max_loss: Annotated[str, typer.Option(help="Loss of accuracy that may ship: a share (0.01) or percents.")] = "1%",
    as_json: AsJson = False,
) -> None:
    """One HTML page from a directory of artifacts: may the pruned model ship?

    Example: moe-edge report demo-output -o report.html
    """
    import vl_convert  # noqa: F401 - jinja2, which the page needs too, is in other extras as well

    from report.report import report as write

    with console.progress(f"reading {directory}"):
        verdict = write(directory, output, max_loss=_share(max_loss))
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
