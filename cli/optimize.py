"""Prune an ONNX model, write its MoE layers as a target wants them, and prove the result.

The model may be from any exporter. What --plan drops is deleted, and so are experts that no input can choose. Without
--target a layer that loses no expert stays as it is.

--form is how the experts of a layer are written. dense runs all on all tokens; sorted runs each on its own tokens;
gather fetches the weights of the K that a token gets; ffn is a plain network, for one expert; moe, qmoe and trt_moe
are fused operators of ONNX Runtime and TensorRT. auto takes the best of those that the target takes.

The proof: the result computes what the model does when dropped experts cannot be selected; if not, nothing is
written. What number formats round is told beside it.

Example: moe-edge optimize exported/ --plan plan.json --target rtx-ada -o optimized/
Example: moe-edge optimize exported/model.onnx --plan plan.json -o pruned-onnx/
Example: moe-edge optimize exported/ --target rtx-ada --precision int8 --rest-precision fp16 -o int8/
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.options import AsJson, Output


def optimize(
    model: Annotated[Path, typer.Argument(help="Model directory or .onnx file.")],
    output: Output,
    plan: Annotated[
        Path | None,
        typer.Option(help="Drop or merge experts by what plan wrote; without it all that can be chosen stay."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Device that the result is for, see moe-edge targets; without it only what loses experts is "
            "rewritten.",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option(metavar="NAME", help="auto, dense, sorted, gather, ffn, moe, qmoe or trt_moe.")
    ] = "auto",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a run, if they are known: auto chooses for so many.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Format of the experts: fp32, fp16, bf16, int8, int4, fp8 or nvfp4; by default as they are.",
        ),
    ] = None,
    rest_precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Format of all else but routers: fp16 or bf16, with what needs it in fp32; or of weights, int8, "
            "int4, fp8 or nvfp4. By default as it is.",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale in int8 or int4: 32, 64 or 128; by default all of an output channel."
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="int8: round what int8 weights multiply, too. Needs --calibration; by default activations are "
            "not rounded.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Task data, .npz, that shows the ranges of activations.")
    ] = None,
    percentile: Annotated[
        float, typer.Option(help="How many percent of an activation's values stay in range, e.g. 99.9.")
    ] = 100.0,
    clamp_top_k: Annotated[
        bool,
        typer.Option(
            "--clamp-top-k", help="Let K shrink where fewer experts than K stay; without it that is an error."
        ),
    ] = False,
    any_model: Annotated[
        bool,
        typer.Option(
            "--any-model", help="Take a plan that was made for another file of this model, such as its checkpoint."
        ),
    ] = False,
    forced: Annotated[
        bool, typer.Option("--forced", help="Write forced.onnx too, whose routing is an input: ids and weights.")
    ] = False,
    observe_experts: Annotated[
        bool,
        typer.Option(
            "--observe-experts",
            help="Write experts.onnx too, whose outputs are logits, ids, weights and norms of the experts.",
        ),
    ] = False,
    prove: Annotated[
        bool, typer.Option("--prove/--no-prove", help="Prove the result; --no-prove saves the time.")
    ] = True,
    allow_partial: Annotated[
        bool,
        typer.Option(
            "--allow-partial", help="Leave layers alone that are not recognised; without it they are an error."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model directory."""
    from moe_spec.formats import FORMATS
    from moe_spec.plan import PruningPlan
    from runtime.targets import find_target

    with console.progress("loading onnx"):
        from graph_passes.optimize import optimize as optimize_model
        from graph_passes.precision import Precision
        from graph_passes.quantization.activations import Activations
        from graph_passes.quantization.rest import of_details
        from graph_passes.unreachable import Unreachable, summarise
        from graph_passes.writers import WRITERS
        from runtime.onnxruntime.backend import OnnxRuntimeRunner

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
        proof += f"; activations in int8 change them by up to {rounded['error']:.1e}"
        proof += f" on the first {rounded['examples']} examples of the data"
    proof += "".join(f"; not run: {what}" for what in manifest.details["not_run"])
    changed = "" if manifest.modified else "; nothing had to change"
    payload = {"modified": manifest.modified, **manifest.to_json()}
    console.result("\n".join([f"{output}: {proof}{changed}", *rows]), payload, as_json)


def _worst(entries: Sequence[Mapping[str, Any]]) -> float:
    """The largest error among ``entries`` of a proof."""
    return max(float(entry["max_rel"]) for entry in entries)
