"""Prune an ONNX model and write its MoE layers in the form that a target wants; the result is proven.

Example: moe-edge optimize exported/ --plan plan.json --target sm89 -o optimized/
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.options import AsJson, Output


def optimize(
    model: Annotated[Path, typer.Argument(help="ONNX file or model directory, whoever exported it.")],
    output: Output,
    plan: Annotated[
        Path | None,
        typer.Option(help="Drop or merge experts by this plan.json; without it all stay that can be chosen."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Device that the result is for; without it only what loses experts is rewritten.")
    ] = None,
    form: Annotated[str, typer.Option(help="auto, dense, sorted, gather, ffn, moe, qmoe or trt_moe.")] = "auto",
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a run, if known: auto chooses for them.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Format of the experts: fp32, fp16, bf16, int8, int4, fp8 or nvfp4.")
    ] = None,
    rest_precision: Annotated[
        str | None,
        typer.Option(
            help="Format of all else: fp16 or bf16 with float32 islands, or weights in int8, int4, fp8, nvfp4."
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Quantised inputs that share a scale: 32, 64 or 128; without it all of an output channel."),
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="int8: what int8 weights multiply is rounded too. Needs --calibration.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Task data (.npz) that show the ranges of activations.")
    ] = None,
    percentile: Annotated[float, typer.Option(help="Of an activation's sizes that stay in range, e.g. 99.9.")] = 100.0,
    clamp_top_k: Annotated[bool, typer.Option(help="Let K shrink where the plan keeps fewer experts.")] = False,
    any_model: Annotated[bool, typer.Option(help="The plan was made for another file of this model.")] = False,
    forced: Annotated[bool, typer.Option(help="Write forced.onnx too: ids and weights are inputs.")] = False,
    observe_experts: Annotated[
        bool, typer.Option(help="Write experts.onnx too: logits, ids, weights and expert norms are outputs.")
    ] = False,
    prove: Annotated[bool, typer.Option("--prove/--no-prove", help="Compare with the masked original.")] = True,
    allow_partial: Annotated[bool, typer.Option(help="Leave layers alone that are not recognised.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prune an ONNX model and write its MoE layers in the form that a target wants; the result is proven.

    Example: moe-edge optimize exported/ --plan plan.json --target sm89 -o optimized/
    """
    from graph_passes.optimize import optimize as optimize_model
    from graph_passes.precision import Precision
    from graph_passes.quantization.activations import Activations
    from graph_passes.quantization.rest import of_details
    from graph_passes.unreachable import Unreachable, summarise
    from graph_passes.writers import WRITERS
    from moe_spec.formats import FORMATS
    from moe_spec.plan import PruningPlan
    from runtime.onnxruntime.backend import OnnxRuntimeRunner
    from runtime.targets import find_target

    asked = Precision.checked(precision, rest_precision, block_size)
    device = None if target is None else find_target(target)
    forms = None if device is None else [name for name in WRITERS if name in device.forms]
    formats = None if device is None else [name for name, dtype in FORMATS.items() if dtype in device.precisions]
    with console.progress(f"reading {model}") as tell:
        manifest = optimize_model(
            model,
            output,
            OnnxRuntimeRunner(on_progress=tell),
            plan=None if plan is None else PruningPlan.load(plan, clamp_top_k=clamp_top_k),
            form=form,
            accepted=forms,
            tokens=tokens,
            precision=asked,
            accepted_precisions=formats,
            activations=Activations.load(activations, calibration, model, percentile),
            any_model=any_model,
            prove=prove,
            forced=forced,
            observe_experts=observe_experts,
            allow_partial=allow_partial,
            on_progress=tell,
        )
    rows = [
        f"  {block.name}: {block.experts} experts, K={block.top_k}, {block.form}, {block.bytes:,} bytes"
        for block in manifest.blocks
    ]
    rest = of_details(manifest.details["rest"])
    rows += [f"  rest in {rest_precision}: {rest}"] if rest.quantized or rest.left else []
    for head in ("unreachable", "not_proven"):
        found = summarise(Unreachable(**entry) for entry in manifest.details[head])
        rows += [f"  {head.replace('_', ' ')}: {line}" for line in found]
    rows += [textwrap.indent(f"left as it is: {layer}", "  ") for layer in manifest.details["left_alone"]]
    oracle = manifest.details["oracle"]
    proof = f"proven to {_worst(oracle):.1e}" if oracle else "not proven (--no-prove)"
    error = manifest.details["precision_error"]
    if error is not None:
        proof += f" beside the rounded experts; quantising changes outputs by up to {error:.1e} of their range"
    casts = manifest.details["casts"]
    if casts is not None:
        proof += f"; casts to {_worst(casts['rewrite']):.1e} beside rounded weights in float32"
        proof += f", to {_worst(casts['low']):.1e} when run" if casts["low"] else ""
        proof += f"; rounding changes outputs by up to {casts['error']:.1e} of their range"
    rounded = manifest.details["activations"]
    if rounded is not None:
        proof += f"; activations in int8 change them by up to {rounded['error']:.1e} on the data"
    proof += "".join(f"; not run: {what}" for what in manifest.details["not_run"])
    changed = "" if manifest.modified else "; nothing had to change"
    payload = {"modified": manifest.modified, **manifest.to_json()}
    console.result("\n".join([f"{output}: {proof}{changed}", *rows]), payload, as_json)


def _worst(entries: Sequence[Mapping[str, Any]]) -> float:
    """The largest error among ``entries`` of a proof."""
    return max(float(entry["max_rel"]) for entry in entries)
