"""Every form is written for every opset that exporters use, passes the checker, and computes what it should."""

import dataclasses
from collections.abc import Mapping

import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.rewrite import OPSETS
from graph_passes.writers import WRITERS
from graph_passes.writers import why_not as why_not_written
from moe_spec.errors import UserError
from moe_spec.experts_op import Activation
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL, OBSERVED
from tests.graph_passes.block_models import ROUTERS, Spec, plan, save
from tests.zoo import RUNNER

CASES: Mapping[str, Spec] = {
    "gelu, groups by two": Spec(activation=Activation("gelu"), gated=False, **ROUTERS["sigmoid_bias_groups"]),
    "tanh gelu, groups by one": Spec(activation=Activation("gelu_tanh"), gated=False, **ROUTERS["softmax_groups"]),
    "squared relu, sparsemixer": Spec(activation=Activation("relu2"), gated=False, **ROUTERS["sparsemixer"]),
    "clamped, biased, top-k first": Spec(
        activation=Activation("silu", 1.702, 7.0, 1.0), biased=True, interleaved=True, **ROUTERS["topk_first"]
    ),
    "clipped sum, selection bias": Spec(**ROUTERS["softmax_bias"]),
    "weights on the input": Spec(form="stacked", **ROUTERS["llama4"]),
    "renormalised": Spec(form="stacked", renormalize=True),
}
"""Between them the writers' every op, but those of capacities."""

KEEP = (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("opset", [17, 18, 20, 21, 23, 24, 25])
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_valid_in_every_opset(tmp_path, case, opset):
    spec = dataclasses.replace(CASES[case], opset=opset, form="stacked")
    path = tmp_path / "block.onnx"
    save(spec, path)
    (block,) = read_model(path).blocks
    written = []
    for form in WRITERS:
        if form in ("ffn", "trt_moe") or why_not_written(block, form) is not None:
            continue
        out = tmp_path / form
        optimize(path, out, RUNNER, plan=plan(spec, KEEP, onnx_sha256(path)), form=form)
        for file in (MODEL, OBSERVED):
            onnx.checker.check_model(str(out / file), full_check=True)
        written.append(form)
    assert {"dense", "sorted", "gather"} <= set(written)


@pytest.mark.parametrize("opset", [16, 26])
def test_another_opset_is_refused_only_where_something_has_to_be_written(tmp_path, opset):
    path, spec = tmp_path / "block.onnx", Spec(form="stacked", opset=opset)
    save(spec, path)
    with pytest.raises(UserError) as error:
        optimize(path, tmp_path / "out", RUNNER, plan=plan(spec, KEEP, onnx_sha256(path)))
    assert error.value.what == f"the model is written for opset {opset}, its layers can be written for 17 to 25"
    assert not (tmp_path / "out").exists()
    optimize(path, tmp_path / "copy", RUNNER)
    assert (tmp_path / "copy" / MODEL).read_bytes() == path.read_bytes()


def test_the_range_is_what_is_tested():
    assert (OPSETS[0], OPSETS[-1]) == (17, 25)
