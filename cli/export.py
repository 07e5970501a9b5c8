"""Export a checkpoint to ONNX, one node a MoE layer, and check it against torch.

Weights are read from the checkpoint's files a few experts at a time, and only those that stay. The graph is compared
with torch where memory holds both; elsewhere the result says that it was not, and the same export on a larger machine
does it.

float32 is the default: ONNX Runtime has no kernels for bfloat16 on a CPU, and `optimize` starts best from it. Opset 20
has Gelu; what came after it is not parsed everywhere.

Example: moe-edge export checkpoint/ -o exported/
Example: moe-edge export checkpoint/ --plan plan.json --dtype bf16 --max-memory 4GB -o exported/
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import AsJson, Output, TrustRemoteCode
from cli.trust import warn_of_code

if TYPE_CHECKING:
    from exporter.preview import Preview


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory in transformers' layout.")],
    output: Output,
    plan: Annotated[Path | None, typer.Option(help="Prune by this plan.json before the export.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset.", min=20, max=23)] = 20,
    task: Annotated[str | None, typer.Option(help="As Hugging Face names it; by default the architecture's.")] = None,
    cache: Annotated[bool, typer.Option(help="Let decoders keep keys and values between calls.")] = True,
    dtype: Annotated[str, typer.Option(help="Format of the graph: fp32, fp16 or bf16; routers stay fp32.")] = "fp32",
    external_data: Annotated[
        int, typer.Option(min=0, help="Bytes from which a weight lies beside the .onnx file, not in it.")
    ] = 1024,
    max_memory: Annotated[
        str | None, typer.Option(help="That the check against torch may take, e.g. 4GB. All that is free.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a model directory."""
    from functools import partial

    import torch

    from exporter.export import export as export_checkpoint
    from exporter.preview import preview
    from models.spread import parse_memory
    from moe_spec.files import refuse_existing
    from moe_spec.formats import FLOATS, FORMATS, require_format
    from moe_spec.plan import PruningPlan
    from pruning.apply import apply_plan
    from runtime.onnxruntime.backend import OnnxRuntimeRunner

    loaded = None if plan is None else PruningPlan.load(plan)
    warn_of_code(checkpoint, trusted=trust_remote_code)
    options: dict[str, Any] = {
        "plan": loaded,
        "prepare": None if loaded is None else partial(apply_plan, plan=loaded),
        "dtype": getattr(torch, FORMATS[require_format(dtype, FLOATS)]),
        "max_memory": None if max_memory is None else parse_memory(max_memory),
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        refuse_existing(output)
        expected = preview(checkpoint, **options)
        console.result("\n".join(_expected(checkpoint, expected)), expected.to_json(), as_json)
        return
    with console.progress(f"tracing {checkpoint}") as tell:
        manifest = export_checkpoint(
            checkpoint,
            output,
            OnnxRuntimeRunner(on_progress=tell),
            opset=opset,
            task=task,
            cache=cache,
            inline_bytes=external_data,
            on_progress=tell,
            **options,
        )
    console.result(
        f"{output}: {len(manifest.blocks)} MoE layers, opset {opset}, {_compared(manifest.details)}",
        manifest.to_json(),
        as_json,
    )


def _compared(details: Any) -> str:
    if "not_compared" not in details:
        return f"differs from torch by at most {max(entry['max_rel'] for entry in details['parity_with_torch']):.1e}"
    bound = details["bound"]
    return (
        f"{bound['weights']:,} weights bound, experts counted\n"
        f"  note: not compared with torch: {details['not_compared']}; the same command on a larger machine does it"
    )


def _expected(checkpoint: Path, preview: "Preview") -> Sequence[str]:
    return (
        f"{checkpoint}: {preview.stored_bytes:,} bytes of weights; {preview.weight_bytes:,} would be written",
        *(f"  {block.name}: {block.experts} experts, K={block.top_k}" for block in preview.blocks),
        f"comparing with torch needs {preview.compare_bytes:,} bytes of memory, {preview.free_bytes:,} may be used",
    )
