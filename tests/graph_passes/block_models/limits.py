"""What cannot be written, or not be run, and why."""

from collections.abc import Mapping

from moe_spec.experts_op import Activation
from tests.graph_passes.block_models.quantize import IN_BLOCKS
from tests.graph_passes.block_models.spec import Spec

FUSED = ("moe", "qmoe")
WITH_MATRICES_OF_ONE = ("masked_loop", "nonzero")


def why_not(spec: Spec) -> str | None:
    """Why no model is like this; None if one can be."""
    return _first(_router(spec) | _dropping(spec) | _fused_router(spec) | _experts(spec) | _stored(spec) | _file(spec))


def why_not_run(spec: Spec) -> str | None:
    """Why ONNX Runtime's CPU provider does not run it; None if it does."""
    adds = spec.form == "nonzero" and spec.scatter in ("ScatterND", "index_put")
    fused, gated = spec.form in FUSED, spec.gated
    return _first(
        {
            "it has no kernels for bfloat16": spec.dtype == "bfloat16",
            "its ScatterND adds no float16": spec.dtype == "float16" and adds,
            "it knows no TRT_MoE": spec.form == "trt_moe",
            "its fused ops take no fc3": fused and gated and spec.separate,
            "its fused ops take gate and up interleaved only": fused and gated and not spec.interleaved,
            "its MoE in float16 gives zeros unless it renormalises": spec.form == "moe"
            and spec.dtype == "float16"
            and not (spec.renormalize or spec.topk_first),
            "its MoE no longer takes (E, in, out)": spec.form == "moe" and spec.transposed,
        }
    )


def _first(reasons: Mapping[str, bool]) -> str | None:
    return next((reason for reason, applies in reasons.items() if applies), None)


def _router(spec: Spec) -> dict[str, bool]:
    input_forms = ("stacked", "masked_loop", "nonzero")
    on_input = spec.weights_on == "input"
    return {
        "the weights of this form multiply the outputs": on_input and spec.form not in input_forms,
        "the experts' input is weighed in the model's type": on_input and spec.weights_float,
        "a bias passes an input gate of 0": on_input and spec.biased,
        "only scores of all experts are cast": spec.router_cast == "scores"
        and (spec.topk_first or spec.selection not in ("topk", "argmax")),
        "the K best logits are scattered, so they are chosen first": spec.gates == "minus_inf" and not spec.topk_first,
        "scores times a mask are scores of all experts": spec.gates == "mask" and spec.topk_first,
        "experts are scaled by their ids": spec.own_scales
        and (spec.selection != "topk" or spec.gates in ("mask", "minus_inf") or spec.capacity is not None),
    }


def _dropping(spec: Spec) -> dict[str, bool]:
    reads_gates = spec.form in ("stacked", "masked_loop") or (spec.form == "nonzero" and spec.hit == "gates")
    masks = reads_gates and spec.gates == "mask" and spec.selection == "argmax"
    places = spec.form == "dispatch" or spec.selection == "two_argmax"
    return {
        "a capacity needs places, or a mask (T, E)": spec.capacity is not None and not places and not masks,
        "its weights are renormalised after dropping, which dispatch does before": spec.form == "dispatch"
        and spec.selection == "two_argmax",
    }


def _fused_router(spec: Spec) -> dict[str, bool]:
    fused = spec.form in FUSED
    plain = spec.score == "softmax" and not spec.selection_bias and spec.groups is None
    normalizes = spec.renormalize or spec.topk_first
    return {
        "the op ranks with a top-k": fused and spec.selection != "topk",
        "MoE takes softmax logits": spec.form == "moe" and not plain,
        "QMoE scores before it ranks": spec.form == "qmoe" and spec.topk_first and not plain,
        "the op has no eps": fused and spec.eps > 0,
        "the op scales no expert by itself": fused and spec.own_scales,
        "the op does not scale": fused and spec.scale != 1 and (spec.form == "moe" or normalizes),
        "the op reads logits in the model's type": fused and spec.weights_float,
    }


def _experts(spec: Spec) -> dict[str, bool]:
    fused, act = spec.form in FUSED, spec.activation
    no_gate = (
        fused and not spec.gated and (act.kind not in ("silu", "gelu_tanh", "relu") or act != Activation(act.kind))
    )
    return {
        "the op's gate is a silu": fused and spec.gated and act.kind != "silu",
        "fc3 goes with the plain silu": fused and spec.gated and spec.separate and act != Activation("silu"),
        "the op lacks this activation": no_gate,
        "TRT_MoE has separate matrices and a silu gate": spec.form == "trt_moe"
        and not (spec.gated and spec.separate and act == Activation("silu")),
    }


def _stored(spec: Spec) -> dict[str, bool]:
    kind, blocks = spec.quantization, spec.quantization in IN_BLOCKS
    divided = spec.hidden % spec.block == 0 and spec.width % spec.block == 0
    return {
        "the form has plain weights": kind is not None and spec.form in ("experts", "moe", "trt_moe"),
        "QMoE has int8 or int4": spec.form == "qmoe" and kind not in ("int8", "int4"),
        "MatMulNBits has one matrix": kind == "matmulnbits" and spec.form not in WITH_MATRICES_OF_ONE,
        "only QMoE and MatMulNBits leave the zero points open": spec.zero_points
        and kind != "matmulnbits"
        and spec.form != "qmoe",
        "the blocks do not divide the weights": blocks and not divided,
        "float8 needs opset 19": kind == "fp8" and spec.opset < 19,
        "int4 needs opset 21": kind == "int4" and spec.form != "qmoe" and spec.opset < 21,
        "scales are not bfloat16": kind is not None and spec.dtype == "bfloat16",
        "each expert is quantised by itself": kind is not None and spec.sliced,
    }


def _file(spec: Spec) -> dict[str, bool]:
    halves = spec.gated and not spec.separate and not spec.interleaved
    return {
        "the function of our node needs opset 18": spec.form == "experts" and spec.opset < 18,
        "the function of our node has gelu from opset 20": spec.form == "experts"
        and spec.activation.kind.startswith("gelu")
        and spec.opset < 20,
        "SplitToSequence takes no bfloat16": spec.dtype == "bfloat16" and spec.unoptimised and halves,
        "a function gives one value": spec.in_function and spec.returns_logits,
        "Einsum takes no bfloat16": spec.dtype == "bfloat16" and (spec.einsum or spec.form == "dispatch"),
    }
