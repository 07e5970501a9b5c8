"""One self-contained HTML page from a run's artifacts."""

import math
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import new_file, refuse_existing
from moe_spec.progress import Progress, silent
from report.artifacts import collect
from report.page import render
from report.variants import variants_of
from report.verdict import Verdict, judge

MAX_LOSS = 0.01
"""What a variant may lose of the unpruned model's accuracy, of 1, and still ship."""


def report(
    directory: Path, output: Path, *, max_loss: float = MAX_LOSS, name: str = "", on_progress: Progress = silent
) -> Verdict:
    """Write the report on all artifacts below ``directory``; stages that left none are named in it.

    The page holds nothing but what the artifacts say, so the same artifacts give the same bytes. What cannot be read is
    listed on it. Every file that a manifest names is hashed.

    Args:
        directory: where the artifacts are.
        output: the HTML file; it must not exist yet.
        max_loss: of the unpruned model's accuracy, what a variant may lose and still ship.
        name: of the run; by default the directory's.
        on_progress: told of every artifact.

    Raises:
        UserError: there is no such directory, ``output`` exists, or ``max_loss`` is no share.
    """
    refuse_existing(output)
    if not (math.isfinite(max_loss) and 0 <= max_loss <= 1):
        raise UserError(f"a loss of {max_loss:g} is no share of 1", hint="give a share or percents: --max-loss 2%")
    artifacts = collect(directory, name, on_progress)
    variants = variants_of(artifacts)
    verdict = judge(artifacts, variants, max_loss)
    on_progress("drawing the page")
    page = render(directory, artifacts, variants, verdict)
    with new_file(output) as staging:
        staging.write_bytes(page.encode("utf-8", "replace"))  # a file's name may hold half a character
    return verdict
