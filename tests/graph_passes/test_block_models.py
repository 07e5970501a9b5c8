"""The hand-written models that readers are tested against compute what numpy computes.

ONNX Runtime runs them on the CPU. What it cannot run there (bfloat16, TRT_MoE, MoE with a separate fc3, ...) is written
and passes onnx.checker, which `save` asks; `limits.why_not_run` says why for each.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moe_spec.experts_op import ACTIVATIONS, Activation
from moe_spec.runner import error_between
from tests.graph_passes.block_models import (
    FORM_NAMES,
    ROUTERS,
    Spec,
    build,
    compute,
    save,
    spec_of,
    why_not,
    why_not_run,
)
from tests.graph_passes.block_models.tensors import DTYPES
from tests.zoo import RUNNER

TOKENS = (1, 5, 37)
TOLERANCES = {"float32": 1e-5, "float16": 5e-3}
CLAMPED = Activation("silu", 1.702, 7.0, 1.0)
Fields = Mapping[str, Any]

WIDE: Fields = {"hidden": 32, "width": 64}


def check(spec: Spec, path: Path) -> None:
    """Write the model and, where ONNX Runtime can, compare it with numpy over ``TOKENS``."""
    save(spec, path)
    assert unread(onnx.load(path).graph) == []
    if why_not_run(spec) is not None:
        return
    xs = [inputs(spec, tokens) for tokens in TOKENS]
    for x, results in zip(xs, RUNNER.run(path, [{"x": x} for x in xs]), strict=True):
        assert results["out"].dtype == x.dtype
        wanted = compute(spec, x, tuple(range(spec.experts)))
        assert error_between(wanted, results["out"])[1] <= TOLERANCES[spec.dtype]


def unread(graph: onnx.GraphProto) -> list[str]:
    """Nodes and initialisers that nothing reads."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    nodes = [node.op_type for node in graph.node if read.isdisjoint(node.output)]
    return nodes + [tensor.name for tensor in graph.initializer if tensor.name not in read]


def inputs(spec: Spec, tokens: int) -> np.ndarray:
    shape = (tokens, spec.hidden) if spec.rank == 2 else (2, tokens, spec.hidden)
    return np.random.default_rng(tokens).standard_normal(shape).astype(DTYPES[spec.dtype])


def possible(forms: Iterable[str], variants: Iterable[Fields]) -> list[Spec]:
    """Every form with every variant that it can have."""
    specs = [spec_of(form, **fields) for form in forms for fields in variants]
    return [spec for spec in specs if why_not(spec) is None]


def changes(spec: Spec) -> str:
    """A test's name: what is not as by default."""
    return ", ".join(f"{key}={value}" for key, value in vars(spec).items() if value != getattr(Spec(), key)) or "plain"


@pytest.mark.parametrize("spec", possible(FORM_NAMES, [{"router": router} for router in ROUTERS]), ids=changes)
def test_every_form_with_every_router_computes_what_numpy_computes(tmp_path, spec):
    check(spec, tmp_path / "block.onnx")


EXPERTS: list[Fields] = [
    *({"activation": Activation(kind), "gated": False} for kind in ACTIVATIONS),
    {"activation": Activation("gelu"), "biased": True, "gated": False},
    {"activation": Activation("gelu"), "opset": 18},
    {"activation": Activation("gelu_tanh"), "opset": 18},
    {"activation": CLAMPED, "interleaved": True, "transposed": True, "biased": True},
    {"activation": CLAMPED, "interleaved": True, "biased": True},
    {"interleaved": True, "separate": True},
    {"transposed": True},
    {"biased": True},
    {"experts": 1, "top_k": 1},
]


@pytest.mark.parametrize("spec", possible(FORM_NAMES, EXPERTS), ids=changes)
def test_every_form_with_every_kind_of_expert(tmp_path, spec):
    check(spec, tmp_path / "block.onnx")


VARIANTS = [
    *(Spec(form=form, gates=gates) for form in ("stacked", "masked_loop") for gates in ("equal", "onehot", "where")),
    *(Spec(form="masked_loop", column=column) for column in ("gather", "split")),
    *(Spec(form="masked_loop", total=total) for total in ("sum", "stack")),
    *(Spec(form="masked_loop", sliced=True, biased=True, transposed=transposed) for transposed in (False, True)),
    *(Spec(form="nonzero", scatter=scatter) for scatter in ("ScatterND", "ScatterElements", "assign")),
    *(Spec(form="nonzero", hit=hit) for hit in ("equal", "gates")),
    *(Spec(form="stacked", einsum=True, transposed=transposed, biased=True) for transposed in (False, True)),
    *(spec_of("stacked", "llama4", tiled=False, einsum=einsum) for einsum in (False, True)),
    Spec(form="stacked", tiled=True),
    Spec(form="dispatch", einsum=True, biased=True),
    Spec(form="dispatch", einsum=True, transposed=True),
    *(spec_of(form, between=between) for form in ("moe", "qmoe") for between in ("Reshape", "Cast")),
    *(spec_of("qmoe", quantization=kind, zero_points=given) for kind in ("int8", "int4") for given in (False, True)),
    spec_of("moe", separate=True, biased=True),
    spec_of("trt_moe", biased=True),
]


@pytest.mark.parametrize("spec", VARIANTS, ids=changes)
def test_every_way_of_writing_a_form(tmp_path, spec):
    check(spec, tmp_path / "block.onnx")


FILES: list[Fields] = [
    {"named": False},
    {"unoptimised": True},
    {"constants_as_nodes": True},
    {"linear": "matmul"},
    {"linear": "matmul", "unoptimised": True},
    {"rank": 3},
    {"rank": 3, "selection": "argmax", "gates": "mask", "hit": "gates", "top_k": 1, "capacity": 3},
    {"rank": 3, "capacity": 3},
    {"layers": 2},
    {"layers": 2, "tied": True},
    {"layers": 2, "in_function": True},
    {"rank": 3, "named": False, "in_function": True},
    {"returns_logits": True},
    {"opset": 17},
    {"opset": 25},
]


@pytest.mark.parametrize("spec", possible(FORM_NAMES, [{"router_bias": True, **file} for file in FILES]), ids=changes)
def test_every_way_of_writing_a_file(tmp_path, spec):
    check(spec, tmp_path / "block.onnx")


STYLES: list[Fields] = [
    {"router": router, **style}
    for router in ROUTERS
    for style in ({"opset": 17}, {"opset": 25}, {"unoptimised": True}, {"in_function": True}, {"linear": "matmul"})
]


@pytest.mark.parametrize("spec", possible(["masked_loop", "dispatch"], STYLES), ids=changes)
def test_every_router_in_every_style(tmp_path, spec):
    check(spec, tmp_path / "block.onnx")


CASTS: list[Fields] = [
    {},
    {"router_cast": "logits"},
    {"router_cast": "scores"},
    {"weights_float": True},
    {"unoptimised": True},
    {"scatter": "assign"},
    *({"router": router} for router in ("sigmoid_bias_groups", "sparsemixer", "switch_capacity", "nllb", "llama4")),
]
HALVES: list[Fields] = [{"dtype": dtype, **casts} for dtype in ("float16", "bfloat16") for casts in CASTS]


@pytest.mark.parametrize("spec", possible(FORM_NAMES, HALVES), ids=changes)
def test_half_precision_with_the_casts_around_the_router(tmp_path, spec):
    check(spec, tmp_path / "block.onnx")


QUANTISED_FORMS = ("stacked", "masked_loop", "nonzero", "batched_mm", "grouped")
QUANTIZED: list[Fields] = [
    {"quantization": kind, **WIDE, "opset": 21, **layout}
    for kind in ("int8", "uint8", "int4", "fp8", "matmulnbits")
    for layout in (
        {},
        {"transposed": True, "biased": True, "linear": "matmul"},
        {"separate": True, "interleaved": True},
        {"unoptimised": True},
        {"einsum": True},
        {"zero_points": True},
        {"dtype": "float16"},
    )
]


@pytest.mark.parametrize("spec", possible(QUANTISED_FORMS, QUANTIZED), ids=changes)
def test_quantised_experts_compute_what_their_dequantised_weights_compute(tmp_path, spec):
    check(spec, tmp_path / "block.onnx")


@pytest.mark.parametrize("router", ROUTERS)
def test_numpy_drops_experts_as_the_graph_does_when_nothing_selects_them(tmp_path, router):
    """A router bias of -inf, and a selection bias of -inf, make an expert unselectable."""
    form = "dispatch" if router == "vmoe" else "masked_loop"
    spec, keep = spec_of(form, router, router_bias=True), (0, 1, 4, 5, 6)
    save(spec, tmp_path / "block.onnx")
    model = onnx.load(tmp_path / "block.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("bias"):
            biases = onnx.numpy_helper.to_array(tensor).copy()
            biases[..., [2, 3, 7]] = -np.inf
            tensor.CopyFrom(onnx.numpy_helper.from_array(biases, tensor.name))
    onnx.save(model, tmp_path / "masked.onnx")
    x = np.random.default_rng(0).standard_normal((37, spec.hidden)).astype(np.float32)
    got = RUNNER.run(tmp_path / "masked.onnx", [{"x": x}])[0]["out"]
    assert error_between(compute(spec, x, keep), got)[1] <= TOLERANCES["float32"]
    assert error_between(compute(spec, x, tuple(range(8))), got)[1] > 0.1


def test_the_router_works_with_fewer_experts_than_it_selects():
    x = np.random.default_rng(0).standard_normal((5, 8))
    np.testing.assert_array_equal(compute(Spec(top_k=4), x, (1,)), compute(Spec(top_k=1), x, (1,)))


REAL: Mapping[str, Fields] = {
    "mixtral": {"renormalize": True},
    "olmoe": {},
    "granitemoe": {"topk_first": True},
    "deepseek_v3": ROUTERS["sigmoid_bias_groups"],
    "gpt_oss": {
        "topk_first": True,
        "router_bias": True,
        "activation": CLAMPED,
        "interleaved": True,
        "transposed": True,
        "biased": True,
    },
}


@pytest.mark.parametrize("name", REAL)
def test_batched_mm_has_the_ops_that_torch_writes(zoo, name):
    """From the router to the sum over the slots: the same ops, equally often."""
    real = onnx.load(zoo.batched_mm(name)).graph.node
    ours = [node.op_type for node in build(Spec(form="batched_mm", **REAL[name])).graph.node]
    first = next(i for i, node in enumerate(real) if any(".gate." in at or ".router." in at for at in node.input))
    assert Counter(ours) == Counter(node.op_type for node in real[first : first + len(ours)])


def test_anonymous_weights_have_no_names(tmp_path):
    save(Spec(form="batched_mm", named=False), tmp_path / "block.onnx")
    names = [tensor.name for tensor in onnx.load(tmp_path / "block.onnx").graph.initializer]
    assert all(name.startswith("val") for name in names)


def test_tied_layers_read_the_same_initialisers(tmp_path):
    save(Spec(form="batched_mm", layers=2, tied=True), tmp_path / "block.onnx")
    model = onnx.load(tmp_path / "block.onnx")
    weights = [tensor.name for tensor in model.graph.initializer if tensor.name.startswith("layers")]
    assert [sum(name in node.input for node in model.graph.node) for name in weights] == [2] * 3
