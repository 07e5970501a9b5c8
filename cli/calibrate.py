"""Run task data through a checkpoint and record what its routers and experts do.

Example: moe-edge calibrate checkpoint/ --data train.npz -o statistics.safetensors
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory in transformers' layout.")],
    data: Annotated[Path, typer.Option(help=".npz of model inputs, or of uint8 `images`.")],
    output: Output,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a forward pass.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many examples.")] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run every expert on every token too, for what needs it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write statistics.safetensors."""
    from pruning.calibrate import calibrate as run

    with console.progress() as bar:
        task = bar.add_task(f"calibrating {checkpoint}", total=None)
        statistics = run(
            checkpoint,
            data,
            output,
            batch_size=batch_size,
            limit=limit,
            dense=dense,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    tokens = statistics.layers[0].token_count
    payload = {
        "output": str(output),
        "model_sha256": statistics.model_sha256,
        "data_sha256": list(statistics.data_sha256),
        "layers": [
            {"name": layer.name, "experts": layer.experts, "top_k": layer.top_k, "token_count": layer.token_count}
            for layer in statistics.layers
        ],
    }
    console.result(f"{output}: {len(statistics.layers)} MoE layers, {tokens} tokens each", payload, as_json)
