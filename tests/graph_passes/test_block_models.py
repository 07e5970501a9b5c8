"""The hand-written models that readers are tested against compute what numpy computes."""


import numpy as np
import onnx
import pytest

from moe_spec.experts_op import ACTIVATIONS, Activation
from moe_spec.runner import error_between
from tests.graph_passes.block_models import FORM_NAMES, ROUTERS, Spec, compute, save, why_not
from tests.zoo import RUNNER

TOKENS = (1, 5, 37)
TOLERANCE = 1e-5
CLAMPED = Activation("silu", 1.702, 7.0, 1.0)


def worst_error(spec: Spec, path) -> float:
    """The largest relative error of the model against numpy, over ``TOKENS``."""
    save(spec, path)
    everything = tuple(range(spec.experts))
    errors = []
    for count in TOKENS:
        shape = (count, spec.hidden) if spec.rank == 2 else (2, count, spec.hidden)
        x = np.random.default_rng(count).standard_normal(shape).astype(np.float32)
        errors.append(error_between(compute(spec, x, everything), RUNNER.run(path, [{"x": x}])[0]["out"])[1])
    return max(errors)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_form_with_every_router_computes_what_numpy_computes(tmp_path, form, router):
    spec = Spec(form=form, **ROUTERS[router])
    if (reason := why_not(spec)) is not None:
        pytest.skip(reason)
    assert worst_error(spec, tmp_path / "block.onnx") <= TOLERANCE


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize(
    "experts",
    [
        *({"activation": Activation(kind), "gated": False} for kind in ACTIVATIONS),
        {"activation": Activation("gelu"), "biased": True, "gated": False},
        {"activation": CLAMPED, "interleaved": True, "transposed": True, "biased": True},
        {"interleaved": True, "separate": True},
        {"transposed": True},
        {"biased": True},
        {"experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_every_form_with_every_kind_of_expert(tmp_path, form, experts):
    spec = Spec(form=form, **experts)
    if (reason := why_not(spec)) is not None:
        pytest.skip(reason)
    assert worst_error(spec, tmp_path / "block.onnx") <= TOLERANCE


VARIANTS = [
    *(Spec(form=form, gates=gates) for form in ("stacked", "masked_loop") for gates in ("equal", "onehot", "where")),
    *(Spec(form="masked_loop", column=column) for column in ("gather", "split")),
    *(Spec(form="masked_loop", total=total) for total in ("sum", "stack")),
    *(Spec(form="nonzero", scatter=scatter) for scatter in ("ScatterND", "ScatterElements", "assign")),
    Spec(form="nonzero", hit="equal"),
    *(Spec(form="stacked", einsum=True, transposed=transposed, biased=True) for transposed in (False, True)),
    Spec(form="stacked", einsum=True, **{**ROUTERS["llama4"], "tiled": False}),
    Spec(form="stacked", **{**ROUTERS["llama4"], "tiled": False}),
    Spec(form="stacked", tiled=True),
    Spec(form="dispatch", einsum=True, biased=True),
    Spec(form="dispatch", einsum=True, transposed=True),
]


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_every_way_of_writing_a_form(tmp_path, spec):
    assert worst_error(spec, tmp_path / "block.onnx") <= TOLERANCE


FILES = [
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
    {"opset": 17},
    {"opset": 25},
]


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_way_of_writing_a_file(tmp_path, form, file):
    spec = Spec(form=form, router_bias=True, **file)
    if (reason := why_not(spec)) is not None:
        pytest.skip(reason)
    assert worst_error(spec, tmp_path / "block.onnx") <= TOLERANCE


def test_anonymous_weights_have_no_names(tmp_path):
    save(Spec(form="batched_mm", named=False), tmp_path / "block.onnx")
    names = [tensor.name for tensor in onnx.load(tmp_path / "block.onnx").graph.initializer]
    assert all(name.startswith("val") for name in names)


@pytest.mark.parametrize("router", ROUTERS)
def test_numpy_drops_experts_as_the_graph_does_when_nothing_selects_them(tmp_path, router):
    """A router bias of -inf, and a selection bias of -inf, make an expert unselectable."""
    form = "dispatch" if router == "vmoe" else "masked_loop"
    spec, keep = Spec(form=form, **(dict(ROUTERS[router]) | {"router_bias": True})), (0, 1, 4, 5, 6)
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
    assert error_between(compute(spec, x, keep), got)[1] <= TOLERANCE
    assert error_between(compute(spec, x, tuple(range(8))), got)[1] > 0.1


def test_the_router_works_with_fewer_experts_than_it_selects():
    x = np.random.default_rng(0).standard_normal((5, 8))
    np.testing.assert_array_equal(compute(Spec(top_k=4), x, (1,)), compute(Spec(top_k=1), x, (1,)))
