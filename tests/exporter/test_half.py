"""Graphs of halves, and graphs that memory does not hold beside torch: what is in them, and what was checked."""

import math
import resource

import onnx
import pytest
import torch

from exporter.export import export
from exporter.preview import preview
from exporter.widen import save_widened
from graph_passes.describe import inspect_model
from models.checkpoints import load_model
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL, Manifest
from tests.cli.helpers import leftovers
from tests.zoo import RUNNER

ROUTERS = {"layers.1.mlp.router.weight", "layers.3.mlp.router.weight"}


@pytest.fixture(scope="module")
def half(zoo, tmp_path_factory):
    """vmoe in float16, compared with torch."""
    out = tmp_path_factory.mktemp("half") / "out"
    export(zoo.checkpoint("vmoe"), out, RUNNER, dtype=torch.float16)
    return out


@pytest.fixture(scope="module")
def unchecked(zoo, tmp_path_factory):
    """vmoe in bfloat16, all weights in the .onnx file, where memory holds nothing beside it."""
    out = tmp_path_factory.mktemp("unchecked") / "out"
    export(zoo.checkpoint("vmoe"), out, RUNNER, dtype=torch.bfloat16, max_memory=0, inline_bytes=10**9)
    return out


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("unchecked", torch.bfloat16)])
def test_weights_are_rounded_once_and_routers_are_not(name, dtype, zoo, request):
    directory = request.getfixturevalue(name)
    state = load_model(zoo.checkpoint("vmoe")).state_dict()
    graph = onnx.load(directory / MODEL).graph
    bound = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    read = {key: value for key, value in bound.items() if key in state}
    assert read.keys() >= ROUTERS
    for key, value in read.items():
        wanted = state[key] if key in ROUTERS else state[key].to(dtype)
        assert str(value.dtype) == str(wanted.dtype).removeprefix("torch.")
        assert torch.equal(torch.from_numpy(value.astype("float32")), wanted.float()), key


@pytest.mark.parametrize("name", ["half", "unchecked"])
def test_the_manifest_says_how_many_bytes_a_layer_has(name, request):
    directory = request.getfixturevalue(name)
    found = [block.nbytes for block in inspect_model(directory).blocks]
    assert [block.bytes for block in Manifest.load(directory).blocks] == found


def test_halves_are_compared_with_torch_of_the_same_weights(half):
    manifest = Manifest.load(half)
    manifest.check_files(half)
    errors = [entry["max_rel"] for entry in manifest.details["parity_with_torch"]]
    assert len(errors) == 3
    assert max(errors) <= 2e-3
    assert manifest.details["dtype"] == "float16"
    assert {value.dtype for value in (*manifest.inputs, *manifest.outputs)} == {"float16"}


def test_nothing_of_halves_is_left_in_a_widened_graph(half, tmp_path):
    save_widened(half / MODEL, tmp_path / MODEL)
    model = onnx.load(tmp_path / MODEL)
    onnx.checker.check_model(model)
    assert onnx.TensorProto.FLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert onnx.TensorProto.FLOAT16 not in {value.type.tensor_type.elem_type for value in inferred.graph.value_info}


def test_what_was_not_compared_is_said_and_why(unchecked, zoo):
    details = Manifest.load(unchecked).details
    assert leftovers(unchecked) >= {MODEL, "manifest.json"}
    assert "model.onnx.data" not in leftovers(unchecked)
    values = sum(value.numel() for value in load_model(zoo.checkpoint("vmoe")).state_dict().values())
    assert details["parity_with_torch"] == []
    assert details["bound"]["weights"] == len(load_model(zoo.checkpoint("vmoe")).state_dict())
    assert 2 * values <= details["bound"]["bytes"] <= 2 * values + 10_000  # routers and the trace's own constants
    assert details["not_compared"] == "torch and ONNX Runtime together need 0.0 GB of memory, 0.0 GB may be used"


def test_a_preview_says_what_is_written(unchecked, zoo):
    state = load_model(zoo.checkpoint("vmoe")).state_dict()
    values = sum(math.prod(value.shape) for value in state.values())
    seen = preview(zoo.checkpoint("vmoe"), dtype=torch.bfloat16, max_memory=7)
    routers = sum(state[name].numel() for name in ROUTERS)
    assert (seen.stored_bytes, seen.weight_bytes) == (4 * values, 2 * values + 2 * routers)
    assert (seen.compare_bytes, seen.free_bytes) == (16 * values, 7)
    assert [(block.name, block.experts, block.top_k) for block in seen.blocks] == [
        ("layers.1.mlp", 8, 2),
        ("layers.3.mlp", 8, 2),
    ]
    assert [block.bytes for block in seen.blocks] == [block.bytes for block in Manifest.load(unchecked).blocks]


def test_a_preview_counts_no_head_that_is_left_out(zoo):
    checkpoint = zoo.checkpoint("mixtral")
    whole, below = (preview(checkpoint, task=task) for task in (None, "feature-extraction"))
    assert whole.weight_bytes - below.weight_bytes == load_model(checkpoint).state_dict()["lm_head.weight"].nbytes


def test_nothing_is_left_where_the_disk_is_full(zoo, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may be larger
    try:
        with pytest.raises(UserError) as refusal:
            export(zoo.checkpoint("vmoe"), tmp_path / "out", RUNNER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refusal.value.what == f"the disk of {tmp_path} cannot hold out: File too large"
    assert refusal.value.hint.endswith(" are free there, nothing half-written is left; give another -o, or make room")
    assert leftovers(tmp_path) == set()
