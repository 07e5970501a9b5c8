"""Export a checkpoint to ONNX, one node for each MoE layer, and compare it with torch.

The file carries that node's definition, so it runs wherever ONNX does; optimize replaces it by what a target is quick
at. Weights are read a few experts at a time, so a checkpoint may be larger than memory; it is then not compared with
torch, and the result says so.

Stay with fp32 unless the file must be small: optimize --precision starts best from it, and ONNX Runtime has no bfloat16
on CPUs. Pruning may wait too: optimize does it on the graph.

Example: moe-edge export checkpoint/ -o exported/
Example: moe-edge export checkpoint/ --plan plan.json -o exported-pruned/
Example: moe-edge export checkpoint/ --dtype bf16 --max-memory 4GB --dry-run -o exported-bf16/
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
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, as transformers writes it.")],
    output: Output,
    plan: Annotated[Path | None, typer.Option(help="Prune by what plan wrote; without it all experts stay.")] = None,
    opset: Annotated[
        int, typer.Option(help="ONNX opset of the graph; more is not parsed everywhere.", min=20, max=23)
    ] = 20,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="As Hugging Face names tasks: text-generation, image-classification, ... By default the "
            "architecture's.",
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option(help="Whether a decoder takes and gives keys and values (past_key_values, present).")
    ] = True,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Format of the graph: fp32, fp16 or bf16. Routers stay fp32.")
    ] = "fp32",
    external_data: Annotated[
        int, typer.Option(min=0, help="Bytes from which a weight lies in model.onnx.data, not in model.onnx.")
    ] = 1024,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="What the comparison with torch may take, e.g. 4GB; by default all that is free."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a model directory."""
    from functools import partial

    from moe_spec.files import refuse_existing
    from moe_spec.formats import FLOATS, FORMATS, require_format
    from moe_spec.plan import PruningPlan

    with console.progress("loading torch"):
        import torch

        from exporter.export import export as export_checkpoint
        from exporter.preview import preview
        from models.spread import parse_memory
        from pruning.apply import apply_plan
        from runtime.onnxruntime.backend import OnnxRuntimeRunner

    loaded = None if plan is None else PruningPlan.load(plan)
    warn_of_code(checkpoint, trusted=trust_remote_code)
    options: dict[str, Any] = {
        "plan": loaded,
        "prepare": None if loaded is None else partial(apply_plan, plan=loaded),
        "task": task,
        "cache": cache,
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
