"""Write a smaller checkpoint, without the experts that a plan drops.

transformers loads it as it loads the first one. Where the plan merges experts, their mean takes their place. An ONNX
model is pruned by optimize instead, and so is a plan that keeps routers as they are.

Example: moe-edge prune checkpoint/ --plan plan.json -o pruned/
Example: moe-edge prune checkpoint/ --plan naee.json --json -o pruned-by-naee/
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output, TrustRemoteCode
from cli.trust import warn_of_code


def prune(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, as transformers writes it.")],
    plan: Annotated[Path, typer.Option(help="What plan wrote for this checkpoint.")],
    output: Output,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint directory."""
    from moe_spec.identity import checkpoint_sha256, checkpoint_weights

    with console.progress(f"reading {checkpoint}") as tell:
        from pruning.prune import prune as run
        from pruning.prune import unloaded_experts

        warn_of_code(checkpoint, trusted=trust_remote_code)
        run(checkpoint, plan, output, trust_remote_code=trust_remote_code, on_progress=tell)
        unloaded = unloaded_experts(output, trust_remote_code=trust_remote_code)
        identity = checkpoint_sha256(output, tell)
    before, after = (
        sum(path.stat().st_size for path in checkpoint_weights(directory)) for directory in (checkpoint, output)
    )
    console.result(
        "\n".join([f"{output}: {after:,} bytes of weights, {before:,} before", *_notes(unloaded)]),
        {
            "output": str(output),
            "model_sha256": identity,
            "weight_bytes": after,
            "weight_bytes_before": before,
            "not_pruned": unloaded,
        },
        as_json,
    )


def _notes(unloaded: Sequence[str]) -> Iterator[str]:
    """What a user has to know of experts that are in the files and in no layer of the model."""
    if unloaded:
        yield f"  note: {len(unloaded)} tensors of experts are of layers that transformers does not load, and are all"
        yield f"  there still; the first is {unloaded[0]}"
