"""What four papers claim, what counts as reproduced, and what comes out here.

    python -m benchmarks.claims > benchmarks/claims.md

Models that are trained and scores that are taken are kept in the cache of ``benchmarks.tasks`` and not made again; a
run that was cut goes on. With ``--claim`` only a part is measured.
"""

import argparse
import sys
import textwrap
from collections.abc import Mapping

import torch

from benchmarks.claims import CLAIMS
from benchmarks.claims.claim import Claim, Outcome
from benchmarks.markdown import table
from moe_spec.errors import UserError
from runtime.measuring.machine import describe_machine

WIDTH = 120


def report(outcomes: Mapping[str, Outcome], seeds: int, command: str) -> str:
    """The whole document: the claims in a line each, then each with its rule, its setting and all its numbers."""
    lines = (
        (claim.paper, claim.claimed, outcome.ours, outcome.verdict)
        for claim, outcome in ((CLAIMS[name], outcome) for name, outcome in outcomes.items())
    )
    sections = "\n\n".join(section(name, CLAIMS[name], outcome) for name, outcome in outcomes.items())
    return f"""# Claims

`{command}` printed this on {describe_machine()}; one thread.

What the four papers say, and what the methods of this repository give on tasks that two cores can train. Numbers are of
held-out test data, the mean of {seeds} seeds and their range. What counts as reproduced was written down before
anything was measured. The papers' models are hundreds of times as large: what is not reproduced here is not refuted.

{table(("paper", "claimed", "ours", "reproduced"), lines, left=4)}

{sections}"""


def section(name: str, claim: Claim, outcome: Outcome) -> str:
    """One claim."""
    words = (f"**Reproduced if** {claim.rule}.", claim.setting)
    verdict = f"**Reproduced: {outcome.verdict}.** {claim.reason}"
    return "\n\n".join((f"## {name}", *map(wrapped, words), outcome.details, wrapped(verdict)))


def wrapped(text: str) -> str:
    """A paragraph in lines of the repository's width."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False)


def main() -> None:
    """Measure and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", action="append", choices=CLAIMS, help="only this one; may be given again")
    parser.add_argument("--seeds", type=int, default=3, help="of everything that is trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.claim or list(CLAIMS)
    parts = "".join(f" --claim {name}" for name in options.claim or ())
    command = f"python -m benchmarks.claims --seeds {options.seeds}{parts}"
    try:
        outcomes = {
            name: CLAIMS[name].measure(options.seeds, lambda line: print(line, file=sys.stderr, flush=True))
            for name in names
        }
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(report(outcomes, options.seeds, command))


if __name__ == "__main__":
    main()
