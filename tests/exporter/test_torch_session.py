"""Checkpoints in torch show what their routers rank, and take what their exports take."""

import ml_dtypes
import numpy as np
import pytest

from exporter.tasks import task_of
from exporter.torch_session import ObservedTorchSession
from graph_passes.proof.mask import mask_model
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from moe_spec.manifest import OBSERVED, Manifest, TensorSpec
from tests.families.configs import tiny
from tests.models_table import TOP_K
from tests.zoo import RUNNER

RANKED = {
    "afmoe": "the block holds the selection bias",
    "deepseek_v2": "experts of other groups are 0",
    "deepseek_v3": "experts of other groups are -inf",
    "deepseek_v4": "the square root of a softplus, and a bias",
    "ernie4_5_moe": "a selection bias of one row, in a module of its own",
    "gemma4": "probabilities for logits",
    "gpt_oss": "logits, of which the best become probabilities",
    "kolibri1": "the bias is added to logits",
    "lfm2_moe": "the block holds the selection bias",
    "mistral4": "groups without a bias",
    "phimoe": "sparsemixer asks no top-k",
}


def session_of(model):
    outputs = (TensorSpec("logits", "float32", ()),)
    like = Manifest(kind="exported", source_sha256="", parent_sha256="", files=(), inputs=(), outputs=outputs)
    return ObservedTorchSession(model, like)


@pytest.mark.parametrize("name", RANKED)
def test_scores_are_what_the_router_ranks(name):
    model = tiny(name)
    session = session_of(model)
    seen = session.run(session.task.example(model.config, 3, 7, np.random.default_rng(0)))
    for layer in find_moe_layers(model):
        gates, scores = (seen[f"{layer.name}/{shown}"] for shown in ("gates", "scores"))
        chosen, best = (np.argsort(ranks)[:, :TOP_K] for ranks in (gates == 0, -scores))
        assert scores.shape == gates.shape == (21, layer.num_experts)
        assert ((gates != 0).sum(axis=1) == TOP_K).all()
        np.testing.assert_array_equal(np.sort(chosen), np.sort(best))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_an_export_shows_the_same_scores(name, zoo, tmp_path):
    exported = zoo.exported(name)
    mask_model(exported, None, tmp_path / "observed")
    manifest = Manifest.load(tmp_path / "observed")
    session = ObservedTorchSession(load_model(zoo.checkpoint(name)), manifest)
    feeds = session.task.example(session.model.config, 3, 7, np.random.default_rng(0))
    (shown,) = RUNNER.run(tmp_path / "observed" / OBSERVED, [feeds])
    seen = session.run(feeds)
    for block in manifest.blocks:
        assert block.scores is not None
        np.testing.assert_allclose(seen[f"{block.name}/scores"], shown[block.scores], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_inputs_in_halves_are_taken_as_the_models_float32(dtype, zoo):
    session = ObservedTorchSession(load_model(zoo.checkpoint("vmoe")), Manifest.load(zoo.exported("vmoe")))
    task = task_of("VMoeForImageClassification")
    feeds = task.example(session.model.config, 2, 1, np.random.default_rng(0))
    narrow = {name: array.astype(dtype) for name, array in feeds.items()}
    expected = session.run({name: array.astype(np.float32) for name, array in narrow.items()})
    np.testing.assert_array_equal(session.run(narrow)["logits"], expected["logits"])
