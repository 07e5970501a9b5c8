"""Forms that our own writers write and others too: what was written is read again, routers and experts."""

from typing import Any

import pytest

from moe_spec.experts_op import Activation
from tests.graph_passes.block_models import ROUTERS, Spec, why_not
from tests.graph_passes.readers.proofs import CLAMPED, assert_same_record, blocks_of, written

FORMS = ("dense", "gather", "sorted")

EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased, interleaved, clamped": {"biased": True, "interleaved": True, "activation": CLAMPED},
    "(E, in, out)": {"transposed": True},
    "not gated": {"gated": False, "activation": Activation("gelu"), "biased": True},
    "tanh gelu": {"gated": False, "activation": Activation("gelu_tanh")},
    "squared relu": {"gated": False, "activation": Activation("relu2")},
    "all selected": {"top_k": 8},
    "one": {"experts": 1, "top_k": 1, "biased": True},
    "half": {"dtype": "float16"},
}


def source_of(router: str, form: str) -> Spec:
    """A model with that router, of a form that has it."""
    gates = "gates" in ROUTERS[router]
    if form == "sorted":
        return Spec(form="nonzero", **{"hit": "gates" if gates else "one_hot", **ROUTERS[router]})
    return Spec(form="stacked" if gates else "experts", **ROUTERS[router])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_read_again_as_it_was_written(tmp_path, router, form):
    spec = source_of(router, form)
    if why_not(spec) is not None:
        pytest.skip(f"no such model: {why_not(spec)}")
    path = written(spec, tmp_path, form)
    (before,), (after,) = blocks_of(tmp_path / "block.onnx", spec.form), blocks_of(path, form)
    assert_same_record(before, after)
    assert (before.name, before.weights_on) == (after.name, after.weights_on)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_all_experts_are_read_again_as_they_were_written(tmp_path, kind, form):
    path = written(Spec(form="experts", **EXPERTS[kind]), tmp_path, form)
    (before,), (after,) = blocks_of(tmp_path / "block.onnx", "experts"), blocks_of(path, form)
    assert_same_record(before, after)
