"""Make a Mixtral of dense checkpoints: each becomes one expert of every layer.

Attention and all else is their mean; expert e of a layer is the feed-forward network of the e-th checkpoint. Of
branches of one model, each trained on a domain of its own, that is Branch-Train-MiX; of one checkpoint, named as often
as there are to be experts, sparse upcycling, which computes what the dense model does. Routers are random: train them.

Example: moe-edge upcycle base/ novels/ speeches/ code/ -o mixtral/
Example: moe-edge upcycle base/ base/ base/ base/ --top-k 1 -o upcycled/
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output


def upcycle(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints of Llama or Mistral, all of one shape.")],
    output: Output,
    top_k: Annotated[int, typer.Option(help="K: how many experts a token gets.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the routers.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint directory."""
    from moe_spec.identity import checkpoint_sha256, checkpoint_weights

    with console.progress(f"reading {len(checkpoints)} checkpoints") as tell:
        from models.upcycle import upcycle as run

        run(checkpoints, top_k, output, seed, tell)
        identity = checkpoint_sha256(output, tell)
    size = sum(path.stat().st_size for path in checkpoint_weights(output))
    console.result(
        f"{output}: {len(checkpoints)} experts a layer, K={top_k}, {size:,} bytes of weights",
        {"output": str(output), "model_sha256": identity, "weight_bytes": size},
        as_json,
    )
