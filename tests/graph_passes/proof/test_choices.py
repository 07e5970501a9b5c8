"""The proof looks at what routers choose, not at outputs alone."""

import dataclasses

import numpy as np
import onnx
import pytest

from graph_passes.optimize import optimize
from graph_passes.proof.choices import Watched, check_choices, compare_choices
from graph_passes.proof.compare import OracleEntry, tolerance_of_scores
from graph_passes.proof.mask import mask_model
from moe_spec.errors import VerificationError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import OBSERVED
from tests.graph_passes.block_models import Spec, plan, save, spec_of
from tests.graph_passes.readers.proofs import edited
from tests.zoo import RUNNER

ALL = tuple(range(8))


def batches(spec: Spec) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(0).standard_normal((40, spec.hidden)).astype(np.float32)}]


def chosen(tmp_path, spec: Spec, keeps, change=lambda _: None, **watched):
    """How choices compare between the model with one and with the other of two sets of experts."""
    source = edited(spec, tmp_path, change)
    outs = [tmp_path / "one", tmp_path / "other"]
    first, second = (
        mask_model(source, plan(spec, keep, onnx_sha256(source)), out).blocks[0]
        for keep, out in zip(keeps, outs, strict=True)
    )
    pair = dataclasses.replace(Watched(first, second, keep=ALL, by_score=True), **watched)
    return compare_choices([pair], batches(spec), outs[0] / OBSERVED, outs[1] / OBSERVED, RUNNER).entries


def test_a_router_that_chooses_other_experts_is_found(tmp_path):
    (entry,) = chosen(tmp_path, Spec(), (ALL, ALL[:4]))
    assert entry.agreeing < entry.tokens == 40
    assert entry.margin is not None
    with pytest.raises(VerificationError) as error:
        check_choices([entry], 1e-5)
    assert str(error.value) == (
        f"the router of layer layers.0.mlp chooses other experts for {40 - entry.agreeing} of 40 tokens than the "
        f"original with the dropped experts unselectable, which prefers its own by {entry.margin:.2e} of its scores' "
        "range (allowed 1e-05); nothing was written"
    )


def mask_the_last(graph: onnx.GraphProto) -> None:
    """Let the router's bias say that no token may choose the last expert."""
    (bias,) = (tensor for tensor in graph.initializer if tensor.name.endswith("gate.bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[-1] = -1e9
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))


def test_other_choices_are_found_beside_a_mask_of_the_models_own(tmp_path):
    """Its logits are ranked too, and all others are small beside them."""
    spec = Spec(topk_first=True, router_bias=True)
    (entry,) = chosen(tmp_path, spec, (ALL, ALL[:4]), mask_the_last)
    assert entry.agreeing < 40
    with pytest.raises(VerificationError, match=r"^the router of layer layers\.0\.mlp chooses other experts for "):
        check_choices([entry], 1e-5)


def test_scores_may_differ_by_what_outputs_may(tmp_path):
    entry = OracleEntry({}, "out", "float32", 0.0, 0.0)
    save(Spec(), tmp_path / "wide.onnx")
    save(Spec(dtype="float16"), tmp_path / "half.onnx")
    assert tolerance_of_scores(tmp_path / "wide.onnx", [entry]) == 1e-5
    assert tolerance_of_scores(tmp_path / "half.onnx", [entry]) == 2e-3
    assert tolerance_of_scores(tmp_path / "wide.onnx", [dataclasses.replace(entry, rounding=1e-4)]) == 4e-4


def test_other_choices_are_no_failure_where_scores_are_as_good_as_equal(tmp_path):
    (entry,) = chosen(tmp_path, Spec(), (ALL, ALL[:4]))
    check_choices([dataclasses.replace(entry, margin=1e-7)], 1e-5)


def test_where_more_than_scores_decides_agreement_is_counted_only(tmp_path):
    (entry,) = chosen(tmp_path, Spec(), (ALL, ALL[:4]), by_score=False)
    assert entry.agreeing < 40
    assert entry.margin is None
    check_choices([entry], 1e-5)


def test_the_manifest_says_how_often_routers_agree(tmp_path):
    spec = spec_of("stacked", "softmax_bias", layers=2)
    source = tmp_path / "block.onnx"
    save(spec, source)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(spec, (1, 4, 5), onnx_sha256(source)))
    assert manifest.details["choices"] == [
        {"layer": f"layers.{layer}.mlp", "tokens": tokens, "agreeing": tokens, "margin": None}
        for tokens in (1, 7, 31)
        for layer in (0, 1)
    ]


def test_experts_that_no_token_chose_are_told(tmp_path):
    """Their logits are 60 below the others: far, but an input could reach that."""
    spec = Spec(router_bias=True)

    def push_away(graph: onnx.GraphProto) -> None:
        (bias,) = (tensor for tensor in graph.initializer if tensor.name.endswith("gate.bias"))
        values = np.where(np.isin(ALL, [2, 5]), np.float32(-60), onnx.numpy_helper.to_array(bias))
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))

    source = edited(spec, tmp_path, push_away)
    made = plan(spec, (0, 1, 2, 3, 5), onnx_sha256(source))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=made)
    assert manifest.details["not_exercised"] == {"layers.0.mlp": [2, 5]}


def test_a_layer_without_a_router_has_no_choice(tmp_path):
    source = tmp_path / "block.onnx"
    save(Spec(), source)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(Spec(), (5,), onnx_sha256(source)), form="ffn")
    assert manifest.details["choices"] == []
