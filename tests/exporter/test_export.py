"""Every tiny model, exported: what its manifest says is what its graph holds and what torch computes."""

import functools
import importlib.metadata
import shutil

import numpy as np
import onnx
import pytest
import torch

from exporter.export import export
from exporter.sources import APPLY
from exporter.tasks import task_of
from exporter.trace import run_torch, trace
from exporter.write import OPSET, TOOLS
from graph_passes.describe import inspect_model
from models.checkpoints import load_model
from models.families import family
from models.moe_layers import find_moe_layers
from models.vmoe.configuration import VMoeConfig
from models.vmoe.modeling import VMoeForImageClassification
from moe_spec.errors import UserError
from moe_spec.experts_op import DOMAIN
from moe_spec.external_data import INLINE_BYTES
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import ALIAS, LayerPlan, Merge
from moe_spec.manifest import MODEL, Manifest, TensorSpec
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from pruning.apply import apply_plan
from tests.cli.helpers import leftovers
from tests.models_table import EXPERTS, HIDDEN, TINY, TOP_K, VOCABULARY
from tests.zoo import RUNNER

DECODERS = sorted(set(TINY) - {"vmoe", "moe_bert"})
TEXT_AXES = ("batch_size", "sequence_length")
TEXT_INPUTS = tuple(TensorSpec(name, "int64", TEXT_AXES) for name in ("input_ids", "attention_mask"))
TEXT_OUTPUTS = (TensorSpec("logits", "float32", (*TEXT_AXES, VOCABULARY)),)

every_model = pytest.mark.parametrize("name", sorted(TINY))
every_decoder = pytest.mark.parametrize("name", DECODERS)


def graph_of(zoo, name):
    return onnx.load(zoo.exported(name) / MODEL, load_external_data=False).graph


@every_model
def test_the_manifest_tells_what_was_exported(name, zoo):
    directory = zoo.exported(name)
    manifest = Manifest.load(directory)
    manifest.check_files(directory)
    identity = checkpoint_sha256(zoo.checkpoint(name))
    assert (manifest.kind, manifest.source_sha256, manifest.parent_sha256) == ("exported", identity, identity)
    assert (manifest.plan, manifest.passes, set(manifest.tools)) == (None, (), set(TOOLS))
    assert manifest.details["opset"] == OPSET
    errors = [entry["max_rel"] for entry in manifest.details["parity_with_torch"]]
    assert len(errors) == 3
    assert max(errors) <= 1e-5


@every_decoder
def test_batch_and_sequence_of_a_decoder_are_dynamic(name, zoo):
    manifest = Manifest.load(zoo.exported(name))
    assert (manifest.inputs, manifest.outputs) == (TEXT_INPUTS, TEXT_OUTPUTS)


def test_batch_and_sequence_of_a_text_classifier_are_dynamic(zoo):
    manifest = Manifest.load(zoo.exported("moe_bert"))
    assert (manifest.inputs, manifest.outputs) == (TEXT_INPUTS, (TensorSpec("logits", "float32", ("batch_size", 10)),))


def test_the_batch_of_a_classifier_is_dynamic(zoo):
    manifest = Manifest.load(zoo.exported("vmoe"))
    assert manifest.inputs == (TensorSpec("pixel_values", "float32", ("batch_size", 1, 12, 12)),)
    assert manifest.outputs == (TensorSpec("logits", "float32", ("batch_size", 10)),)


@every_model
def test_the_manifest_and_the_graph_agree_on_every_layer(name, zoo):
    said = Manifest.load(zoo.exported(name)).blocks
    found = inspect_model(zoo.exported(name))
    assert found.unrecognised == ()
    assert [(block.name, block.experts, block.top_k, block.keep, block.form, block.bytes) for block in said] == [
        (block.name, EXPERTS, TOP_K, tuple(range(EXPERTS)), "experts", block.nbytes) for block in found.blocks
    ]
    assert [block.name for block in said] == [layer.name for layer in find_moe_layers(TINY[name]())]


@every_model
def test_one_node_stands_for_the_experts_of_a_layer(name, zoo):
    model = load_model(zoo.checkpoint(name))
    nodes = [node for node in graph_of(zoo, name).node if node.domain == DOMAIN]
    layers = find_moe_layers(model)
    assert [node.name for node in nodes] == [f"{layer.name}.experts" for layer in layers]
    for node, layer in zip(nodes, layers, strict=True):
        parameters = {f"{layer.name}.experts.{parameter}" for parameter, _ in layer.experts.named_parameters()}
        assert set(node.input[3:]) == parameters


@every_model
def test_routers_and_experts_lie_in_the_graph_under_their_names_in_the_checkpoint(name, zoo):
    model = load_model(zoo.checkpoint(name))
    row = family(model.config.model_type)
    parts = tuple(f"{layer.name}.{part}." for layer in find_moe_layers(model) for part in (row.router, row.experts))
    weights = {path: list(weight.shape) for path, weight in model.state_dict().items() if path.startswith(parts)}
    found = {tensor.name: list(tensor.dims) for tensor in graph_of(zoo, name).initializer}
    assert {path: found.get(path) for path in weights} == weights
    assert len(weights) >= 3 * len(find_moe_layers(model))


@every_model
def test_no_trace_of_the_tracer_is_left_in_the_file(name, zoo):
    model = onnx.load(zoo.exported(name) / MODEL, load_external_data=False)
    assert (model.producer_name, model.producer_version) == ("moe-edge", importlib.metadata.version("moe-edge"))
    written = model.SerializeToString()
    assert [word for word in (b"wrapped", b"torch", b".py") if word in written] == []
    assert len(model.functions) == 1


@pytest.mark.parametrize("name", [*DECODERS, "moe_bert"])
def test_padded_tokens_are_masked(name, zoo):
    model = load_model(zoo.checkpoint(name))
    task = task_of(type(model).__name__)
    feeds = task.example(model.config, 3, 9, np.random.default_rng(3))
    feeds["attention_mask"][0, :4] = feeds["attention_mask"][1, :1] = 0
    seen = feeds["attention_mask"].astype(bool) if name in DECODERS else np.array([True, True, False])
    (got,) = RUNNER.run(zoo.exported(name), [feeds])
    expected = run_torch(model, task, feeds)["logits"][seen]
    assert error_between(expected, got["logits"][seen])[1] <= 1e-5
    everything = {**feeds, "attention_mask": np.ones_like(feeds["attention_mask"])}
    assert error_between(expected, run_torch(model, task, everything)["logits"][seen])[1] > 1e-2


def test_the_graph_does_not_grow_with_the_experts(zoo):
    small = load_model(zoo.checkpoint("vmoe"))
    config = VMoeConfig.from_dict(small.config.to_dict() | {"num_experts": 4 * EXPERTS})
    large = VMoeForImageClassification(config).eval()
    graph = trace(large, task_of(type(large).__name__), find_moe_layers(large), OPSET).proto.graph
    assert [node.op_type for node in graph.node] == [node.op_type for node in graph_of(zoo, "vmoe").node]


@every_model
def test_everybody_may_read_every_file(name, zoo):
    modes = {path.name: path.stat().st_mode & 0o777 for path in zoo.exported(name).iterdir()}
    assert modes == dict.fromkeys(modes, 0o644)
    assert {MODEL, f"{MODEL}.data", "config.json", "manifest.json"} <= set(modes)


def test_large_weights_lie_beside_the_graph(zoo):
    for tensor in graph_of(zoo, "vmoe").initializer:
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert outside == (len(tensor.raw_data) == 0)
        assert outside or len(tensor.raw_data) < INLINE_BYTES


KEEP = (0, 4, 7)
COMPANIONS = {"chat_template.jinja", "merges.txt", "preprocessor_config.json", "tokenizer.model"}


def plan_for(checkpoint):
    """Layer 3 keeps three experts, layer 1 all of them."""
    return PruningPlan(checkpoint_sha256(checkpoint), "by hand", (LayerPlan("layers.3.mlp", EXPERTS, TOP_K, KEEP),))


@pytest.fixture(scope="module")
def pruned(zoo, tmp_path_factory):
    """An export with a plan, of a checkpoint with files beside its weights."""
    root = tmp_path_factory.mktemp("pruned")
    checkpoint = shutil.copytree(zoo.checkpoint("vmoe"), root / "checkpoint")
    for name in (*COMPANIONS, "notes.txt"):
        (checkpoint / name).write_text(name)
    plan = plan_for(checkpoint)
    export(checkpoint, root / "out", RUNNER, plan=plan, prepare=functools.partial(apply_plan, plan=plan))
    return root


def test_a_pruned_model_keeps_the_ids_of_its_parent(pruned, zoo):
    manifest = Manifest.load(pruned / "out")
    assert manifest.plan == plan_for(pruned / "checkpoint")
    assert [(block.experts, block.keep) for block in manifest.blocks] == [(8, tuple(range(8))), (3, KEEP)]
    whole = Manifest.load(zoo.exported("vmoe")).blocks[1].bytes
    assert [block.nbytes for block in inspect_model(pruned / "out").blocks] == [whole, whole * 3 // 8]
    assert [block.bytes for block in manifest.blocks] == [whole, whole * 3 // 8]


def test_companions_of_a_checkpoint_go_along(pruned):
    own = {"config.json", "manifest.json", "model.onnx", "model.onnx.data"}
    assert leftovers(pruned / "out") == own | COMPANIONS
    assert leftovers(pruned) == {"checkpoint", "out"}


def test_a_plan_that_was_not_applied_is_refused(zoo, tmp_path):
    checkpoint = zoo.checkpoint("vmoe")
    with pytest.raises(UserError) as refusal:
        export(checkpoint, tmp_path / "out", RUNNER, plan=plan_for(checkpoint))
    assert refusal.value.what == "the plan keeps 3 experts in layer layers.3.mlp, but 8 are to be exported"
    assert refusal.value.hint == APPLY
    assert leftovers(tmp_path) == set()


def test_a_plan_whose_experts_nobody_merged_is_refused(zoo, tmp_path):
    checkpoint = zoo.checkpoint("vmoe")
    merges = (Merge((0, 1, 2), (1.0, 1.0, 1.0)), *(Merge((one,), (1.0,)) for one in range(3, EXPERTS)))
    layer = LayerPlan("layers.3.mlp", EXPERTS, TOP_K, (0, 3, 4, 5, 6, 7), router=ALIAS, merge=merges)
    plan = PruningPlan(checkpoint_sha256(checkpoint), "by hand", (layer,))
    with pytest.raises(UserError) as refusal:
        export(checkpoint, tmp_path / "out", RUNNER, plan=plan)
    assert refusal.value.what == "by the plan rows of routers share merged experts, but nothing merges them here"
    assert refusal.value.hint == APPLY


def test_an_exporter_that_fails_without_a_word_is_reported(zoo, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise torch.onnx.OnnxExporterError from AssertionError()

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError) as refusal:
        export(zoo.checkpoint("vmoe"), tmp_path / "out", RUNNER)
    message = "torch.onnx cannot trace VMoeForImageClassification: AssertionError: no more is said"
    assert refusal.value.what == message


def test_features_are_exported_without_the_head(zoo, tmp_path):
    manifest = export(zoo.checkpoint("mixtral"), tmp_path / "out", RUNNER, task="feature-extraction")
    assert manifest.outputs == (TensorSpec("last_hidden_state", "float32", (*TEXT_AXES, HIDDEN)),)
    assert [block.name for block in manifest.blocks] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    graph = onnx.load(tmp_path / "out" / MODEL, load_external_data=False).graph
    assert "lm_head.weight" not in {tensor.name for tensor in graph.initializer}


def test_a_model_that_is_all_head_has_no_features(zoo, tmp_path):
    with pytest.raises(UserError) as refusal:
        export(zoo.checkpoint("vmoe"), tmp_path / "out", RUNNER, task="feature-extraction")
    assert refusal.value.what == "VMoeForImageClassification has no part without its head"
    assert leftovers(tmp_path) == set()
