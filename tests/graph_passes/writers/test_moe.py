"""Form ``moe``: every router whose weights sum to 1, in one op; the others are refused with the reason."""

import onnx
import pytest

from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from moe_spec.experts_op import Activation
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from tests.graph_passes.block_models import ROUTERS, Spec, plan
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import ALL, ONE, THREE, assert_pruned_exactly, saved
from tests.zoo import RUNNER

SHARES = (
    "softmax", "softmax_renormalised", "softmax_masked", "softmax_bias", "topk_first", "topk_first_scattered",
    "sigmoid_bias", "sigmoid_bias_groups", "switch", "nllb",
)  # fmt: skip
REFUSED = {
    "sigmoid": "the op's router is a softmax, and the gates of a sigmoid, top-k router do not sum to 1",
    "sigmoid_bias_eps": "the op's router is a softmax, and the gates of a sigmoid, selection bias, top-k, renormalised "
    "router do not sum to 1; it adds 1e-06 to their sum",
    "softmax_groups": "the op's router is a softmax, and the gates of a softmax, 2 of 4 groups, top-k router do not "
    "sum to 1",
}
RANKED_BY_MORE = ("softmax_bias", "sigmoid_bias", "sigmoid_bias_groups")
SHARP = Activation("silu", 1.5, 0.75, 0.5)


def source_of(router: str, **fields) -> Spec:
    form = "stacked" if "gates" in ROUTERS[router] else "batched_mm"
    return spec_of(**{"form": form, "router": router, **fields})


def refusal(spec: Spec, folder, keep=THREE, form="moe") -> UserError:
    source = saved(spec, folder)
    made: PruningPlan = plan(spec, keep, onnx_sha256(source))
    with pytest.raises(UserError) as error:
        optimize(source, folder / "out", RUNNER, plan=made, form=form)
    assert not (folder / "out").exists()
    return error.value


@pytest.mark.parametrize("router", SHARES)
@pytest.mark.parametrize("keep", [(0, 1, 4, 5), ONE, ALL], ids=["4 of 8", "1 of 8", "all"])
def test_a_router_whose_weights_are_shares_is_one_op(tmp_path, router, keep):
    manifest = assert_pruned_exactly(source_of(router), tmp_path, keep, form="moe")
    assert [block.form for block in manifest.blocks] == ["moe"]
    ops = [node.op_type for node in onnx.load(tmp_path / "out" / MODEL).graph.node]
    assert ("Log" in ops) == (router in RANKED_BY_MORE and (len(keep) > 1 or router != "softmax_bias"))


@pytest.mark.parametrize(
    "fields",
    [
        {"biased": True},
        {"activation": SHARP},
        {"gated": False, "activation": Activation("relu")},
        {"gated": False, "activation": Activation("gelu_tanh"), "biased": True},
        {"scale": 2.5, "renormalize": True, "biased": True},
    ],
)
def test_experts_that_the_op_has(tmp_path, fields):
    assert_pruned_exactly(source_of("softmax", **fields), tmp_path, THREE, form="moe")


@pytest.mark.parametrize(("router", "reason"), REFUSED.items())
def test_routers_that_it_cannot_express_are_refused(tmp_path, router, reason):
    error = refusal(source_of(router), tmp_path, (0, 1, 4, 5))
    assert error.what == f"form moe cannot express layer layers.0.mlp: {reason}"
    assert error.hint == "use --form auto, or another form"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"activation": Activation("gelu")}, "the op gates with silu, this layer with gelu"),
        (
            {"gated": False, "activation": Activation("gelu")},
            "the op has no activation gelu without a gate",
        ),
        (
            {"form": "experts", "dtype": "float16"},
            "ONNX Runtime's CPU kernel gives zeros in float16 unless it renormalises",
        ),
        (
            {"quantization": "int8", "hidden": 64, "width": 32},
            "its weights are quantised, which qmoe takes",
        ),
    ],
)
def test_experts_that_it_cannot_express_are_refused(tmp_path, fields, reason):
    error = refusal(source_of("softmax", **fields), tmp_path)
    assert error.what == f"form moe cannot express layer layers.0.mlp: {reason}"
