"""Write a smaller checkpoint: the experts that a plan drops are gone, and transformers loads the rest.

Example: moe-edge prune checkpoint/ --plan plan.json -o pruned/
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output


def prune(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory in transformers' layout.")],
    plan: Annotated[Path, typer.Option(help="plan.json for this checkpoint.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint directory."""
    from moe_spec.identity import checkpoint_sha256, checkpoint_weights
    from pruning.apply import prune as run

    with console.status(f"pruning {checkpoint}"):
        run(checkpoint, plan, output)
    before, after = (
        sum(path.stat().st_size for path in checkpoint_weights(directory)) for directory in (checkpoint, output)
    )
    console.result(
        f"{output}: {after:,} bytes of weights, {before:,} before",
        {
            "output": str(output),
            "model_sha256": checkpoint_sha256(output),
            "weight_bytes": after,
            "weight_bytes_before": before,
        },
        as_json,
    )
