"""Export a checkpoint to ONNX, one node a MoE layer, and check it against torch.

Example: moe-edge export checkpoint/ -o exported/
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory in transformers' layout.")],
    output: Output,
    plan: Annotated[Path | None, typer.Option(help="Prune by this plan.json before the export.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset.", min=20, max=23)] = 20,
    task: Annotated[str | None, typer.Option(help="As Hugging Face names it; by default the architecture's.")] = None,
    cache: Annotated[bool, typer.Option(help="Let decoders keep keys and values between calls.")] = True,
    as_json: AsJson = False,
) -> None:
    """Export a checkpoint to ONNX, one node a MoE layer, and check it against torch.

    Example: moe-edge export checkpoint/ -o exported/
    """
    from functools import partial

    from exporter.export import export as export_checkpoint
    from moe_spec.plan import PruningPlan
    from pruning.apply import apply_plan
    from runtime.onnxruntime_backend import OnnxRuntimeRunner

    loaded = None if plan is None else PruningPlan.load(plan)
    prepare = None if loaded is None else partial(apply_plan, plan=loaded)
    with console.status(f"exporting {checkpoint}"):
        manifest = export_checkpoint(
            checkpoint,
            output,
            OnnxRuntimeRunner(),
            opset=opset,
            plan=loaded,
            prepare=prepare,
            task=task,
            cache=cache,
        )
    parity = max(entry["max_rel"] for entry in manifest.details["parity_with_torch"])
    console.result(
        f"{output}: {len(manifest.blocks)} MoE layers, opset {opset}, differs from torch by at most {parity:.1e}",
        manifest.to_json(),
        as_json,
    )
