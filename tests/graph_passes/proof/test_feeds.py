"""Inputs for graphs that nobody has told us anything about."""

import numpy as np
import onnx
import pytest

from graph_passes.describe import io_of
from graph_passes.model_file import load_graph
from graph_passes.proof.feeds import batches_for, random_batches
from graph_passes.readers import read_blocks
from graph_passes.task_data import fit_data
from moe_spec.dataset import Dataset
from moe_spec.runner import Arrays
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.graph_passes.block_models import Spec, save


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (Spec(), [(1, 8), (7, 8), (31, 8)]),
        (Spec(experts=32, top_k=4), [(1, 8), (7, 8), (129, 8)]),
        (Spec(rank=3), [(1, 1, 8), (3, 7, 8), (2, 31, 8)]),
        (Spec(rank=3, experts=32, top_k=4), [(1, 1, 8), (3, 7, 8), (5, 31, 8)]),
    ],
)
def test_the_largest_input_has_more_tokens_than_experts_times_k(tmp_path, spec, shapes):
    save(spec, tmp_path / "block.onnx")
    graph = load_graph(tmp_path / "block.onnx")
    blocks = read_blocks(graph, tmp_path).blocks
    assert [feeds["x"].shape for feeds in random_batches(graph, blocks)] == shapes


def test_images_are_as_many_as_before(zoo):
    graph = load_graph(zoo.exported("vmoe") / "model.onnx")
    assert [feeds["pixel_values"].shape[0] for feeds in random_batches(graph, ())] == [1, 3, 2]


def test_a_decoder_goes_on_and_begins_and_both(zoo):
    graph = load_graph(zoo.cached("mixtral") / "model.onnx")
    batches = random_batches(graph, ())
    assert [feeds["input_ids"].shape for feeds in batches] == [(1, 1), (3, 7), (2, 31)]
    assert [feeds["attention_mask"].shape for feeds in batches] == [(1, 5), (3, 7), (2, 36)]
    assert [feeds["past_key_values.1.value"].shape[2] for feeds in batches] == [4, 0, 5]
    assert [feeds["position_ids"][0, 0] for feeds in batches] == [4, 0, 5]


def test_a_cache_holds_what_the_model_keeps_of_tokens(zoo):
    """Not random numbers, which make a trained model magnify rounding."""
    given: list[Arrays] = []

    class Recording(OnnxRuntimeRunner):
        def run(self, model, batches, outputs=None):
            given.extend(super().run(model, batches, outputs))
            return given

    model = zoo.cached("mixtral") / "model.onnx"
    graph = load_graph(model)
    random, kept = random_batches(graph, ()), batches_for(model, graph, (), Recording(threads=1))
    for before, after in zip(random, kept, strict=True):
        assert [(name, before[name].shape) for name in before] == [(name, after[name].shape) for name in before]
        assert all((before[name] == after[name]).all() for name in ("input_ids", "attention_mask", "position_ids"))
    for feeds, outputs in zip((kept[0], kept[2]), given, strict=True):
        np.testing.assert_array_equal(feeds["past_key_values.1.key"], outputs["present.1.key"])


def test_inputs_in_bfloat16_are_drawn_and_made_of_floats(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 20]> g (bfloat16[n, 4] x) => (bfloat16[n, 4] y) { y = Identity(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "half.onnx")
    graph = load_graph(tmp_path / "half.onnx")
    assert {feeds["x"].dtype.name for feeds in random_batches(graph, ())} == {"bfloat16"}
    assert all(feeds["x"].astype(np.float32).std() > 0.1 for feeds in random_batches(graph, ()))
    data = Dataset({"x": np.ones((3, 4), np.float32)}, None, "")
    assert fit_data(data, io_of(graph)[0], "data.npz").feeds["x"].dtype.name == "bfloat16"
