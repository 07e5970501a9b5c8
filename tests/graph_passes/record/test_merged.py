"""Plans that merge: survivors become weighted means of their groups, in the graph as in the checkpoint.

The witness is the same graph whose tensors were averaged by hand, of which `optimize` drops the others.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.proof import compare
from graph_passes.proof.mask import mask_model
from graph_passes.record import merge
from moe_spec.errors import UserError, VerificationError
from moe_spec.layer_plan import ALIAS, MEAN, ROWS, LayerPlan, Merge
from moe_spec.runner import error_between
from tests.graph_passes.block_files import assert_clean, plan, run, saved, tokens
from tests.graph_passes.block_models import FORM_NAMES, Spec, spec_of
from tests.graph_passes.block_models.limits import WITH_MATRICES_OF_ONE
from tests.graph_passes.block_models.spec import layer_name
from tests.zoo import RUNNER

MERGED: Mapping[int, tuple[tuple[int, ...], tuple[float, ...]]] = {
    1: ((0, 1), (0.5, 2.0)),
    3: ((2, 3), (1.0, 3.0)),
    4: ((4,), (0.7,)),
    7: ((5, 6, 7), (1.0, 0.0, 0.2)),
}
"""By survivor: its group, and their weights; inside the halves that some routers have as groups."""


def layer(spec: Spec, **changed) -> LayerPlan:
    merges = tuple(Merge(*members) for members in MERGED.values())
    whole = LayerPlan(layer_name(0), 8, spec.top_k, tuple(MERGED), groups=spec.groups, merge=merges)
    return dataclasses.replace(whole, **changed)


def edited(source, name: str, change, *parts: str):
    """``source`` with ``change`` done to the values (E, ...) of all tensors whose names have one of ``parts``."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if any(part in tensor.name for part in parts) and 8 in list(tensor.dims)[:2]:
            values = np.array(onnx.numpy_helper.to_array(tensor))
            change(values[0] if values.shape[0] == 1 else values)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, source.with_name(name))
    return source.with_name(name)


def average(values_E) -> None:
    for survivor, (experts, weights) in MERGED.items():
        values_E[survivor] = np.average(values_E[list(experts)].astype(np.float64), axis=0, weights=weights)


def by_hand(source, router: str = ROWS):
    return edited(source, "merged.onnx", average, ".experts.", *((".gate.", ".router.") if router == MEAN else ()))


def assert_equal(spec: Spec, one, other) -> None:
    for count in (1, 5, 37):
        x = tokens(spec, count)
        assert error_between(run(one, x)["out"], run(other, x)["out"])[1] <= 1e-5


@pytest.mark.parametrize("form", [form for form in FORM_NAMES if form not in ("qmoe", "trt_moe")])
def test_every_form_is_merged_as_its_tensors_are(tmp_path, form):
    spec = spec_of(form, "softmax_renormalised", sliced=form in WITH_MATRICES_OF_ONE)
    source = saved(spec, tmp_path)
    merging, dropping = layer(spec), layer(spec, merge=())
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(source, merging), form="dense")
    assert [(entry.experts, entry.keep) for entry in manifest.blocks] == [(4, tuple(MERGED))]
    assert all(entry["agreeing"] == entry["tokens"] for entry in manifest.details["choices"])
    hand = by_hand(source)
    optimize(hand, tmp_path / "hand", RUNNER, plan=plan(hand, dropping), form="gather")
    assert_equal(spec, tmp_path / "hand", tmp_path / "out")
    assert_clean(tmp_path / "out")


@pytest.mark.parametrize(
    "router",
    ["softmax_bias", "topk_first", "sigmoid_bias_groups", "sparsemixer", "nllb_capacity", "llama4", "own_scales"],
)
def test_rows_are_means_too_and_the_reference_is_known_without_the_result(tmp_path, router):
    spec = spec_of("stacked", router, router_bias=router == "topk_first")
    source = saved(spec, tmp_path)
    merging = plan(source, layer(spec, router=MEAN))
    optimize(source, tmp_path / "out", RUNNER, plan=merging, form="sorted")
    mask_model(source, merging, tmp_path / "reference")
    hand = by_hand(source, MEAN)
    optimize(hand, tmp_path / "hand", RUNNER, plan=plan(hand, layer(spec, merge=())), form="gather")
    for witness in ("reference", "hand"):
        assert_equal(spec, tmp_path / witness, tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"form": "experts", "biased": True},
        {"form": "stacked", "separate": True},
        {"interleaved": True},
        {"transposed": True, "biased": True},
        {"gated": False, "biased": True},
    ],
    ids=str,
)
def test_neurons_are_aligned_however_they_lie(tmp_path, fields):
    """Experts that are a survivor with its neurons in another order: their mean is the survivor."""
    spec = Spec(**fields)
    source = saved(spec, tmp_path)
    order = np.random.default_rng(0).permutation(spec.width)
    halves = [*order, *(spec.width + order)] if spec.gated else order

    def permute(values_E) -> None:
        for survivor, (experts, _) in MERGED.items():
            for expert in set(experts) - {survivor}:
                values_E[expert] = values_E[survivor]
                for axis, length in enumerate(values_E[expert].shape):
                    if length == 2 * spec.width and spec.interleaved:
                        pairs = values_E[expert].swapaxes(0, axis).reshape(spec.width, 2, -1)[order]
                        values_E[expert] = pairs.reshape(2 * spec.width, -1).swapaxes(0, axis)
                    elif length in (spec.width, 2 * spec.width):
                        values_E[expert] = values_E[expert].take(order if length == spec.width else halves, axis)

    copies = edited(source, "permuted.onnx", permute, ".experts.")
    optimize(copies, tmp_path / "out", RUNNER, plan=plan(copies, layer(spec, align=True)), form="dense")
    optimize(source, tmp_path / "dropped", RUNNER, plan=plan(source, layer(spec, merge=())), form="dense")
    assert_equal(spec, tmp_path / "dropped", tmp_path / "out")


def test_rows_share_experts_that_were_not_merged_before(tmp_path):
    spec = spec_of("experts", biased=True)
    source = saved(spec, tmp_path)
    sharing = plan(source, layer(spec, router=ALIAS))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=sharing, form="dense")
    assert manifest.blocks[0].router.endswith(", 8 of 8 rows lead to one of 4 experts")

    def share(values_E) -> None:
        average(values_E)
        for survivor, (experts, _) in MERGED.items():
            values_E[list(experts)] = values_E[survivor]

    hand = edited(source, "shared.onnx", share, ".experts.")
    assert_equal(spec, hand, tmp_path / "out")
    mask_model(source, sharing, tmp_path / "reference")
    assert_equal(spec, hand, tmp_path / "reference")


def test_means_are_quantised_afterwards(tmp_path):
    spec = Spec(form="stacked", hidden=32, width=32)
    source, how = saved(spec, tmp_path), Precision("int8")
    merging = plan(source, layer(spec, align=True))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=merging, precision=how, form="sorted")
    assert 0 < manifest.details["precision_error"] < 0.05


def test_the_mean_of_halves_is_rounded_once_to_float32_and_then_to_them(tmp_path):
    spec = Spec(form="stacked", dtype="float16")
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec)), form="sorted")
    merged, before = (read_model(path).blocks[0].experts.down_EFH.load() for path in (tmp_path / "out", source))
    mean = (0.5 * before[0].astype(np.float64) + 2.0 * before[1].astype(np.float64)) / 2.5
    np.testing.assert_array_equal(merged[0], mean.astype(np.float32).astype(np.float16))


def test_quantised_experts_have_no_mean(tmp_path):
    spec = spec_of("qmoe")
    source = saved(spec, tmp_path)
    with pytest.raises(UserError) as refusal:
        optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec)))
    assert (refusal.value.what, refusal.value.hint) == (
        "the plan merges experts [0, 1] of layer layers.0.mlp, whose weights are quantised: their mean would have to "
        "be rounded anew",
        "merge in the float model, and quantise the result: moe-edge optimize exported/ --plan plan.json "
        "--precision int8",
    )
    assert not (tmp_path / "out").exists()


def test_the_proof_sees_neurons_that_are_torn_apart(tmp_path, monkeypatch):
    spec = Spec(form="stacked")
    source = saved(spec, tmp_path)
    monkeypatch.delitem(merge.AXIS_OF_NEURONS, "down_EFH")
    with pytest.raises(VerificationError, match="of the original with its neurons in order differs from what it was"):
        optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, align=True)))
    assert not (tmp_path / "out").exists()


def test_the_proof_sees_other_means(tmp_path):
    spec = Spec(form="stacked")
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec)), form="sorted")
    equal = tuple(Merge(experts, (1.0,) * len(experts)) for experts, _ in MERGED.values())
    mask_model(source, plan(source, layer(spec, merge=equal)), tmp_path / "reference")
    with pytest.raises(VerificationError, match="output 'out' of the optimised graph differs from the original"):
        compare.check([{"x": tokens(spec)}], tmp_path / "reference", tmp_path / "out", RUNNER)
