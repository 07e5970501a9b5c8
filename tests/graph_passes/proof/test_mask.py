"""The reference: the original graph with experts made unselectable."""

import numpy as np
import onnx
import pytest

from graph_passes.optimize import optimize
from graph_passes.proof.mask import mask_model
from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import OBSERVED, Manifest
from moe_spec.plan import PruningPlan
from tests.graph_passes.block_models import NAME, Spec, compute, plan, save, spec_of
from tests.zoo import RUNNER

SPECS = {
    "softmax": Spec(),
    "softmax, renormalised": Spec(renormalize=True),
    "top-k, softmax": Spec(topk_first=True, router_bias=True),
    "sigmoid with selection bias": Spec(score="sigmoid", selection_bias=True, renormalize=True, scale=2.5),
    "groups": Spec(score="sigmoid", selection_bias=True, groups=Groups(2, 1), renormalize=True),
    "groups without a bias": Spec(score="sigmoid", groups=Groups(4, 2)),
    "groups scored by their best": spec_of("experts", "softmax_groups"),
    "sparsemixer": spec_of("experts", "sparsemixer"),
    "top-1 by argmax": spec_of("stacked", "switch"),
    "top-2 by argmax": spec_of("stacked", "nllb"),
    "top-k, sigmoid on the input": spec_of("stacked", "llama4"),
    "choice spread over places": spec_of("dispatch", "softmax_bias"),
    "fused op": spec_of("moe", "softmax_renormalised"),
}


def observed(tmp_path, spec: Spec, keep: tuple[int, ...]):
    tmp_path.mkdir(exist_ok=True)
    source, out = tmp_path / "block.onnx", tmp_path / "masked"
    save(spec, source)
    manifest = mask_model(source, plan(spec, keep, onnx_sha256(source)), out)
    x = np.random.default_rng(1).standard_normal((9, spec.hidden)).astype(np.float32)
    block = manifest.blocks[0]
    assert block.gates is not None
    assert block.scores is not None
    result = RUNNER.run(out / OBSERVED, [{"x": x}])[0]
    return x, result["out"], result[block.gates], result[block.scores]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("keep", [(0, 1, 5), (0, 1, 4, 5), tuple(range(8))])
def test_dropped_experts_are_never_selected(tmp_path, spec, keep):
    x, out, gates, scores = observed(tmp_path, spec, keep)
    dropped = sorted(set(range(8)) - set(keep))
    assert not gates[:, dropped].any()
    assert np.isneginf(scores[:, dropped]).all()
    assert ((gates != 0).sum(axis=1) == spec.top_k).all()
    np.testing.assert_allclose(out, compute(spec, x, keep), rtol=1e-4, atol=1e-5)


ONE_BY_ONE = [spec_of("experts", "sparsemixer"), spec_of("stacked", "nllb"), spec_of("dispatch", "sparsemixer")]


@pytest.mark.parametrize("spec", ONE_BY_ONE, ids=["sparsemixer", "top-2 by argmax", "sparsemixer with places"])
def test_what_is_chosen_beyond_the_last_expert_weighs_nothing(tmp_path, spec):
    """The second choice is among experts that are gone; the last one must not be chosen twice, nor be NaN."""
    x, out, gates, _ = observed(tmp_path, spec, (5,))
    np.testing.assert_array_equal(np.flatnonzero(gates.any(axis=0)), [5])
    np.testing.assert_allclose(gates[:, 5], 1, rtol=1e-6)
    np.testing.assert_allclose(out, compute(spec, x, (5,)), rtol=1e-4, atol=1e-5)


def test_a_plan_for_more_experts_is_refused(tmp_path):
    """Those that the graph lacks would be left out, and part of the plan be masked."""
    source = tmp_path / "block.onnx"
    save(Spec(), source)
    made = PruningPlan("", "by hand", (LayerPlan(NAME, 16, 2, (0, 1, 9)),))
    with pytest.raises(UserError) as error:
        mask_model(source, made, tmp_path / "masked")
    assert (error.value.what, error.value.hint) == (
        f"the plan says that layer {NAME} has 16 experts and no routing groups, the graph has 8 and no routing groups",
        "make a plan for this model with `moe-edge plan`",
    )
    assert not (tmp_path / "masked").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_that_are_an_output_stay_what_they_were(tmp_path, dtype):
    spec = spec_of("experts", "softmax", returns_logits=True, dtype=dtype)
    source = tmp_path / "block.onnx"
    save(spec, source)
    mask_model(source, plan(spec, (1, 2), onnx_sha256(source)), tmp_path / "masked")
    x = np.random.default_rng(1).standard_normal((9, spec.hidden)).astype(dtype)
    before, after = (RUNNER.run(path, [{"x": x}])[0] for path in (source, tmp_path / "masked" / "model.onnx"))
    (logits,) = before.keys() - {"out"}
    np.testing.assert_array_equal(after[logits], before[logits])
    assert not np.array_equal(after["out"], before["out"])


def test_a_negative_logit_of_a_dropped_expert_does_not_win(tmp_path):
    """Masking by multiplication would turn it into the largest."""
    _, _, gates, _ = observed(tmp_path, Spec(experts=2, top_k=1), (1,))
    assert (gates[:, 1] == 1).all()


def test_without_renormalisation_untouched_tokens_are_rescaled(tmp_path):
    """Invariant I2: softmax over the survivors gives p / (1 - sum of dropped p)."""
    everything = tuple(range(8))
    _, _, before, _ = observed(tmp_path / "all", Spec(top_k=1), everything)
    _, _, after, _ = observed(tmp_path / "some", Spec(top_k=1), (0, 1, 2, 3, 4, 5))
    same = (before != 0).argmax(1) == (after != 0).argmax(1)
    assert same.any()
    assert (after.max(1)[same] > before.max(1)[same]).all()


def test_ties_are_broken_as_they_were(tmp_path):
    """Survivors stay in the order of their ids, by which ONNX breaks ties."""
    keep = (1, 2, 4, 6)
    source = tmp_path / "block.onnx"
    save(Spec(), source)
    model = onnx.load(source)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("gate.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(onnx.numpy_helper.to_array(weight)), weight.name))
    onnx.save(model, source)
    made = plan(Spec(), keep, onnx_sha256(source))
    mask_model(source, made, tmp_path / "masked")
    optimize(source, tmp_path / "pruned", RUNNER, plan=made)
    x, chosen = np.ones((3, 8), np.float32), []
    for name in ("masked", "pruned"):
        (block,) = Manifest.load(tmp_path / name).blocks
        assert block.gates is not None
        (seen,) = RUNNER.run(tmp_path / name / OBSERVED, [{"x": x}])
        chosen.append([np.flatnonzero(row).tolist() for row in seen[block.gates]])
    assert chosen == [[[1, 2]] * 3, [[0, 1]] * 3]


def test_nothing_is_masked_without_a_plan(tmp_path):
    source = tmp_path / "block.onnx"
    save(Spec(), source)
    mask_model(source, None, tmp_path / "observed")
    x = np.random.default_rng(1).standard_normal((9, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        RUNNER.run(tmp_path / "observed" / "model.onnx", [{"x": x}])[0]["out"], RUNNER.run(source, [{"x": x}])[0]["out"]
    )
