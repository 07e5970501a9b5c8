"""The stage: what it writes, what it refuses, and that a failed proof writes nothing."""

import dataclasses
import json

import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.model_file import load_graph
from graph_passes.optimize import optimize
from graph_passes.proof import compare
from graph_passes.proof.feeds import random_batches
from graph_passes.proof.mask import mask_model
from graph_passes.record.prune import match_layers
from moe_spec.errors import UserError, VerificationError
from moe_spec.files import sha256_file
from moe_spec.identity import onnx_sha256, pruned_sha256
from moe_spec.layer_plan import NEW, LayerPlan, Merge
from moe_spec.manifest import MODEL, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.graph_passes.block_models import NAME, Spec, compute, plan, save
from tests.zoo import RUNNER

KEEP = (0, 2, 5)


@pytest.fixture
def source(tmp_path):
    save(Spec(), tmp_path / "block.onnx")
    return tmp_path / "block.onnx"


def planned(source, **changes) -> PruningPlan:
    made = plan(Spec(), KEEP, onnx_sha256(source))
    return dataclasses.replace(made, layers=(dataclasses.replace(made.layers[0], **changes),))


def refusal(source, made: PruningPlan, **options) -> UserError:
    with pytest.raises(UserError) as error:
        optimize(source, source.parent / "out", RUNNER, plan=made, **options)
    assert not (source.parent / "out").exists()
    return error.value


def test_the_manifest_describes_what_was_done(source, tmp_path):
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=planned(source), form="dense")
    assert Manifest.load(tmp_path / "out") == manifest
    manifest.check_files(tmp_path / "out")
    assert manifest.source_sha256 == manifest.parent_sha256 == onnx_sha256(source)
    assert [(entry.name, entry.modified) for entry in manifest.passes] == [
        ("inline-functions", False),
        ("fold-conditions", False),
        ("delete-unreachable", False),
        ("prune-experts", True),
        ("write-blocks", True),
    ]
    prune, write = manifest.passes[-2:]
    dropped = 5 * 4 * (8 + 3 * 8 * 12)
    assert (prune.modified, prune.bytes_before - prune.bytes_after) == (True, dropped)
    assert write.bytes_before == prune.bytes_after
    assert {entry["output"] for entry in manifest.details["oracle"]} == {"out"}
    assert [entry["shapes"]["x"][0] for entry in manifest.details["oracle"]] == [1, 7, 31]


def test_the_chain_of_hashes_goes_on(source, tmp_path):
    optimize(source, tmp_path / "first", RUNNER)
    assert Manifest.load(tmp_path / "first").parent_sha256 == onnx_sha256(source)
    assert sha256_file(tmp_path / "first" / "manifest.json") != onnx_sha256(source)


def test_config_json_gets_the_new_counts(zoo, tmp_path):
    source = zoo.exported("mixtral")
    blocks = Manifest.load(source).blocks
    layers = tuple(LayerPlan(block.name, 8, 2, KEEP) for block in blocks)
    identity = Manifest.load(source).source_sha256
    optimize(source, tmp_path / "even", RUNNER, plan=PruningPlan(identity, "by hand", layers))
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)
    uneven = (layers[0], dataclasses.replace(layers[1], keep=(1, 2)))
    optimize(source, tmp_path / "uneven", RUNNER, plan=PruningPlan(identity, "by hand", uneven))
    config = json.loads((tmp_path / "uneven" / "config.json").read_text())
    assert config["moe_edge"] == {
        "model.layers.0.mlp": {"experts": 3, "top_k": 2},
        "model.layers.1.mlp": {"experts": 2, "top_k": 2},
    }


def test_a_plan_for_another_model_is_refused(source):
    error = refusal(source, dataclasses.replace(planned(source), model_sha256="0" * 64))
    assert error.what == (f"the plan was made for model 000000000000, but {source} is model {onnx_sha256(source)[:12]}")


def test_a_plan_for_other_experts_of_the_same_model_is_refused(source, tmp_path):
    """Both halves are called the same, have as many experts, and come from one model."""
    first, second = (tmp_path / name for name in ("first", "second"))
    for half, keep in ((first, (0, 1, 2, 3)), (second, (4, 5, 6, 7))):
        optimize(source, half, RUNNER, plan=plan(Spec(), keep, onnx_sha256(source)))
    halves = [read_model(half) for half in (first, second)]
    assert [half.source_sha256 for half in halves] == [onnx_sha256(source)] * 2
    made = PruningPlan(halves[0].model_sha256, "by hand", (LayerPlan(NAME, 4, 2, (1, 2)),))
    with pytest.raises(UserError) as error:
        optimize(second, tmp_path / "out", RUNNER, plan=made)
    mine, theirs = (half.model_sha256[:12] for half in halves)
    assert error.value.what == f"the plan was made for model {mine}, but {second} is model {theirs}"
    assert optimize(first, tmp_path / "out", RUNNER, plan=made).blocks[0].keep == (1, 2)


def test_a_pruned_model_is_the_same_in_another_form(source, tmp_path):
    pruned = optimize(source, tmp_path / "pruned", RUNNER, plan=planned(source))
    reformed = optimize(tmp_path / "pruned", tmp_path / "dense", RUNNER, form="dense")
    copied = optimize(tmp_path / "dense", tmp_path / "copied", RUNNER)
    reference = mask_model(tmp_path / "pruned", None, tmp_path / "reference")
    identities = {manifest.model_sha256 for manifest in (pruned, reformed, copied, reference)}
    assert identities == {pruned_sha256(onnx_sha256(source), {NAME: KEEP})}
    assert Manifest.load(tmp_path / "copied").model_sha256 == pruned.model_sha256
    whole = optimize(source, tmp_path / "whole", RUNNER, form="dense")
    assert whole.model_sha256 == onnx_sha256(source)


def test_a_plan_for_the_whole_model_still_holds_for_layers_that_have_all_experts(zoo, tmp_path):
    source = zoo.exported("mixtral")
    identity, names = Manifest.load(source).source_sha256, [block.name for block in Manifest.load(source).blocks]
    plans = [PruningPlan(identity, "by hand", (LayerPlan(name, 8, 2, KEEP),)) for name in names]
    optimize(source, tmp_path / "one", RUNNER, plan=plans[0])
    both = optimize(tmp_path / "one", tmp_path / "both", RUNNER, plan=plans[1])
    at_once = PruningPlan(identity, "by hand", tuple(one.layers[0] for one in plans))
    assert both.model_sha256 == optimize(source, tmp_path / "once", RUNNER, plan=at_once).model_sha256


def test_a_plan_with_other_counts_is_refused(source):
    error = refusal(source, planned(source, experts=9))
    assert error.what == (
        f"the plan says that layer {NAME} has 9 experts and no routing groups, the graph has 8 and no routing groups"
    )


def test_a_plan_that_lowers_k_alone_is_refused(source):
    error = refusal(source, planned(source, top_k=1))
    assert error.what == f"the plan sets K=1 in layer {NAME}, whose router selects K=2"


def test_an_unknown_layer_in_a_plan_is_refused(source):
    error = refusal(source, planned(source, name="layers.7.mlp"))
    assert error.what == "the plan names layer 'layers.7.mlp', which the model lacks"
    assert error.hint == f"the model's MoE layers are: {NAME}"


def test_a_router_that_is_drawn_anew_is_refused_by_all_who_read_plans(source, tmp_path):
    merges = tuple(Merge((expert, expert + 1), (1, 2)) for expert in KEEP)
    drawing = planned(source, merge=merges, router=NEW)
    what = f"the plan draws the router of layer {NAME} anew, and a graph does not say how a new model's is drawn"
    error = refusal(source, drawing)
    assert (error.what, error.hint) == (
        what,
        "export the checkpoint with the plan: moe-edge export CHECKPOINT --plan plan.json -o exported/; or plan with "
        "--router mean",
    )
    with pytest.raises(UserError, match=what):
        mask_model(source, drawing, tmp_path / "reference")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"form": "dens"}, "unknown form 'dens'"),
        ({"form": "sorted", "accepted": ("dense", "ffn")}, "the target does not take form 'sorted'"),
    ],
)
def test_an_unknown_form_is_refused_before_any_work(source, options, what):
    assert refusal(source, planned(source), **options).what == what


def test_an_output_that_exists_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER)
    assert error.value.what == f"{tmp_path / 'out'} already exists"
    assert list((tmp_path / "out").iterdir()) == []


class WrongRunner(OnnxRuntimeRunner):
    """Adds noise to what the second file that it is given computes."""

    calls = 0

    def run(self, model, batches, outputs=None):
        type(self).calls += 1
        results = super().run(model, batches, outputs)
        if type(self).calls == 2:
            results = [{name: value + 1e-3 for name, value in result.items()} for result in results]
        return results


def test_a_failed_proof_writes_nothing(source, tmp_path):
    with pytest.raises(VerificationError, match="output 'out' of the optimised graph differs from the original"):
        optimize(source, tmp_path / "out", WrongRunner(), plan=planned(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.onnx"]


class InterruptedRunner(OnnxRuntimeRunner):
    def run(self, *_):
        raise KeyboardInterrupt


def test_an_interrupt_in_the_middle_leaves_nothing(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        optimize(source, tmp_path / "out", InterruptedRunner(), plan=planned(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.onnx"]


def test_the_proof_sees_a_wrong_expert(source, tmp_path):
    """The oracle compares with the plan: a graph that kept other experts does not pass."""
    optimize(source, tmp_path / "out", RUNNER, plan=planned(source))
    mask_model(source, plan(Spec(), (0, 2, 6), onnx_sha256(source)), tmp_path / "other")
    with pytest.raises(VerificationError):
        compare.check(random_batches(load_graph(source), ()), tmp_path / "other", tmp_path / "out", RUNNER)


def test_layers_match_by_order_where_the_graph_has_lost_its_names(zoo):
    blocks = read_model(zoo.exported("mixtral")).blocks
    anonymous = [dataclasses.replace(block, name=f"moe.{index}") for index, block in enumerate(blocks)]
    layers = tuple(LayerPlan(block.name, 8, 2, KEEP) for block in blocks)
    assert match_layers(PruningPlan("", "", layers), anonymous) == list(layers)


def test_shared_weights_are_cloned_not_edited(tmp_path):
    """Two layers that share one router weight: pruning one leaves the other whole."""
    path = tmp_path / "two.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    second = [onnx.NodeProto() for _ in model.graph.node]
    for copy, node in zip(second, list(model.graph.node), strict=True):
        copy.CopyFrom(node)
        copy.name = f"second.{node.name}" if node.name else ""
        own = {"x", "out", "logits", "scores", "best", "ids", "selected", "gates"}
        copy.input[:] = ["out" if name == "x" else f"{name}_2" if name in own else name for name in node.input]
        copy.output[:] = [f"{name}_2" for name in node.output]
    model.graph.node.extend(second)
    model.graph.output[0].name = "out_2"
    onnx.save(model, path)
    layer = LayerPlan(NAME, 8, 2, KEEP)
    assert [block.num_experts for block in read_model(path).blocks] == [8, 8]
    manifest = optimize(path, tmp_path / "out", RUNNER, plan=PruningPlan(onnx_sha256(path), "by hand", (layer,)))
    assert manifest.details["oracle"]
    assert np.isfinite(max(entry["max_rel"] for entry in manifest.details["oracle"]))


def test_a_layer_that_became_an_ffn_does_not_shift_the_names_of_others(tmp_path):
    """Where a graph has lost its names, layers are counted; the manifest still knows them all."""
    spec, source = Spec(form="batched_mm", layers=2, named=False), tmp_path / "block.onnx"
    save(spec, source)
    first, second = (LayerPlan("moe.0", 8, 1, (5,)), LayerPlan("moe.1", 8, 2, (1, 3, 6)))
    identity = onnx_sha256(source)
    optimize(source, tmp_path / "one", RUNNER, plan=PruningPlan(identity, "by hand", (first,)))
    manifest = optimize(tmp_path / "one", tmp_path / "both", RUNNER, plan=PruningPlan(identity, "by hand", (second,)))
    assert [(entry.name, entry.keep, entry.form) for entry in manifest.blocks] == [
        ("moe.0", (5,), "ffn"),
        ("moe.1", (1, 3, 6), "sorted"),
    ]
    x = np.random.default_rng(0).standard_normal((7, spec.hidden)).astype(np.float32)
    got = RUNNER.run(tmp_path / "both" / MODEL, [{"x": x}])[0]["out"]
    assert error_between(compute(spec, x, (5,), (1, 3, 6)), got)[1] <= 1e-5
