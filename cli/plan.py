"""Choose which experts stay, by a criterion and a budget.

--keep is a count of experts a layer (4) or a share of them (0.5 or 50%, rounded half up, at least one). --scope global
spends the same number in all where the scores are highest. Criteria: reap, frequency, gate-mass; random needs no
statistics, a checkpoint will do.

Example: moe-edge plan statistics.safetensors --keep 50% -o plan.json
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output


def plan(
    source: Annotated[Path, typer.Argument(help="statistics.safetensors, or a checkpoint for criterion random.")],
    keep: Annotated[str, typer.Option(help="Experts to keep: a count (4) or a share (0.5, 50%).")],
    output: Output,
    criterion: Annotated[str, typer.Option(help="reap, frequency, gate-mass or random.")] = "reap",
    scope: Annotated[str, typer.Option(help="layer: the same count in each; global: one ranking over all.")] = "layer",
    seed: Annotated[int, typer.Option(min=0, help="Seed of criterion random.")] = 0,
    clamp_top_k: Annotated[bool, typer.Option("--clamp-top-k", help="Let K shrink where fewer experts stay.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write plan.json."""
    from pruning.budget import parse_keep
    from pruning.plan import PlanOptions
    from pruning.plan import plan as run

    options = PlanOptions(parse_keep(keep), criterion, scope, seed, clamp_top_k)
    made = run(source, options, output)
    kept, experts = (sum(counts) for counts in zip(*((len(one.keep), one.experts) for one in made.layers), strict=True))
    console.result(
        f"{output}: keeps {kept} of {experts} experts in {len(made.layers)} layers, by {criterion}",
        {"output": str(output), **made.to_json()},
        as_json,
    )
