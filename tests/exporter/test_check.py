"""A trace is not trusted: graphs that lost something, or that compute something else, are found out."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporter import check
from exporter.check import SHAPES, SHAPES_WITH_CACHE, check_axes, check_experts, check_parity
from exporter.rounding import run_in_double
from exporter.tasks import PADDED, task_of, with_cache
from exporter.trace import run_torch
from models.checkpoints import load_model, load_skeleton
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError, VerificationError
from moe_spec.manifest import MODEL, Manifest
from moe_spec.runner import Feeds
from tests.heard import Heard
from tests.zoo import RUNNER

REPORT = "this is a fault of the export, not of your model: please report it with the model's config.json"


@pytest.fixture
def proto(zoo):
    return onnx.load(zoo.exported("vmoe") / MODEL, load_external_data=False)


@pytest.fixture
def layers(zoo):
    return find_moe_layers(load_skeleton(zoo.checkpoint("vmoe")))


def lose_the_layer(proto):
    (node,) = (node for node in proto.graph.node if node.name == "layers.3.mlp.experts")
    proto.graph.node.remove(node)


def lose_an_expert(proto):
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name == "layers.3.mlp.experts.up_proj")
    weight.dims[0] = 7


def compute_the_weight(proto):
    (node,) = (node for node in proto.graph.node if node.name == "layers.3.mlp.experts")
    node.input[3] = "computed"


def test_a_graph_with_every_expert_passes(proto, layers):
    check_experts(proto, layers)


@pytest.mark.parametrize(
    ("damage", "found"), [(lose_the_layer, "no"), (lose_an_expert, "7"), (compute_the_weight, "no")]
)
def test_a_graph_that_lost_experts_is_refused(damage, found, proto, layers):
    damage(proto)
    with pytest.raises(UserError) as refusal:
        check_experts(proto, layers)
    assert refusal.value.what == f"the traced graph has {found} experts in layer layers.3.mlp, the model has 8"
    assert refusal.value.hint == REPORT


class Altered:
    """ONNX Runtime, with something done to each output."""

    def __init__(self, alter):
        self._alter = alter

    def run(self, model, batches, outputs=None):
        results = RUNNER.run(model, batches, outputs)
        return [{name: self._alter(name, array) for name, array in result.items()} for result in results]


def parity(zoo, runner, name="vmoe", **options):
    model = load_model(zoo.checkpoint(name))
    return check_parity(model, task_of(type(model).__name__), zoo.exported(name) / MODEL, runner, **options)


def test_the_errors_at_every_shape_are_reported(zoo):
    heard = Heard()
    report = parity(zoo, RUNNER, on_progress=heard)
    assert heard.counts("comparing with torch") == [(done, len(SHAPES)) for done in range(len(SHAPES) + 1)]
    assert [(entry["shape"], entry["output"]) for entry in report] == [(list(shape), "logits") for shape in SHAPES]
    assert all(entry["max_rel"] <= 1e-5 for entry in report)


@pytest.mark.parametrize(
    ("alter", "error"),
    [(lambda _, array: array * np.float32(1.001), "1.00e-03"), (lambda _, array: array * np.nan, "inf")],
)
def test_a_wrong_output_is_a_failed_verification(alter, error, zoo):
    with pytest.raises(VerificationError) as failure:
        parity(zoo, Altered(alter))
    assert str(failure.value) == (
        f"output logits differs from torch by {error} of its range at batch and sequence (1, 1), allowed is 1e-05"
    )


def test_a_static_axis_is_a_failed_verification(zoo):
    with pytest.raises(VerificationError) as failure:
        parity(zoo, Altered(lambda _, array: array[:2]))
    assert str(failure.value) == (
        "axis 0 (batch_size) of output logits came out static: it has shape (2, 10) for batch and sequence (3, 7), "
        "torch gives (3, 10)"
    )


def cached_parity(zoo, runner):
    model = load_model(zoo.decoder("mixtral"))
    task = with_cache(task_of("MixtralForCausalLM"), model)
    return check_parity(model, task, zoo.cached("mixtral") / MODEL, runner)


def test_a_cache_is_compared_with_and_without_tokens_in_it(zoo):
    entries = Manifest.load(zoo.cached("mixtral")).details["parity_with_torch"]
    presents = [f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert [(tuple(entry["shape"]), entry["output"]) for entry in entries] == [
        (shape, output) for shape in SHAPES_WITH_CACHE for output in ("logits", *presents)
    ]
    assert max(entry["max_rel"] for entry in entries) <= 1e-5


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda name, array: array * 2 if name == "present.1.key" else array,
            "output present.1.key differs from torch by 1.00e+00 of its range at batch and sequence (1, 1) with 0 "
            "tokens in the cache, allowed is 1e-05",
        ),
        (
            lambda name, array: array[:, :, :7] if name == "present.0.value" else array,
            "axis 2 (past_sequence_length + sequence_length) of output present.0.value came out static: it has shape "
            "(2, 2, 7, 8) for batch and sequence (2, 12) with 5 tokens in the cache, torch gives (2, 2, 17, 8)",
        ),
    ],
)
def test_a_wrong_cache_is_a_failed_verification(alter, message, zoo):
    with pytest.raises(VerificationError) as failure:
        cached_parity(zoo, Altered(alter))
    assert str(failure.value) == message


def test_what_padding_gives_is_not_compared(zoo):
    def spoil(name, array):
        if name == "logits" and array.shape[:2] == (3, 7):
            array[0, :PADDED] = np.nan
        return array

    assert cached_parity(zoo, Altered(spoil))


def test_a_graph_that_fails_at_another_shape_is_a_failed_verification(zoo):
    def fail(name, array):
        raise UserError("Reshape", hint="")

    with pytest.raises(VerificationError, match=r"^the graph does not run at shapes that were not traced: Reshape$"):
        cached_parity(zoo, Altered(fail))


def test_a_static_input_is_named(proto):
    task = task_of("VMoeForImageClassification")
    check_axes(proto, task)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(
        VerificationError, match=r"^axis 0 \(batch_size\) of input pixel_values came out static: it is 2$"
    ):
        check_axes(proto, task)


def test_a_cache_holds_what_the_model_keeps_of_tokens(zoo):
    """Not random numbers, which make a trained model magnify rounding."""
    model: Any = load_model(zoo.decoder("mixtral"))
    torch.nn.init.zeros_(model.model.layers[1].self_attn.k_proj.weight)
    fed: list[Feeds] = []

    class Recording(Altered):
        def run(self, model, batches, outputs=None):
            fed.extend(batches)
            return super().run(model, batches, outputs)

    task = with_cache(task_of("MixtralForCausalLM"), model)
    recording: Any = Recording(lambda _, array: array)
    with pytest.raises(VerificationError):
        check_parity(model, task, zoo.cached("mixtral") / MODEL, recording)
    assert [feeds["past_key_values.1.key"].shape[2] for feeds in fed] == [past for _, _, past in SHAPES_WITH_CACHE]
    assert all(not feeds["past_key_values.1.key"].any() for feeds in fed)
    assert all(feeds["past_key_values.1.value"].any() for feeds in fed if feeds["past_key_values.1.key"].size)


def test_what_rounding_explains_is_no_failure(zoo, monkeypatch):
    """With no tolerance at all, the graph may still be about as far from float64 as torch itself is."""
    monkeypatch.setitem(check.TOLERANCES, torch.float32, 0.0)
    asked: list[Feeds] = []

    def in_double(model, task, feeds):
        asked.append(feeds)
        return run_in_double(model, task, feeds)

    monkeypatch.setattr(check, "run_in_double", in_double)
    assert max(entry["max_rel"] for entry in cached_parity(zoo, RUNNER)) > 0
    assert asked
    with pytest.raises(VerificationError, match=r", allowed is 0e\+00$"):
        cached_parity(zoo, Altered(lambda _, array: array * np.float32(1.00001)))


def test_a_model_that_was_in_double_is_as_before(zoo):
    model = load_model(zoo.checkpoint("mixtral"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = task_of("MixtralForCausalLM")
    feeds = task.example(model.config, 2, 5, np.random.default_rng(0))
    exact, expected = run_in_double(model, task, feeds), run_torch(model, task, feeds)
    assert exact["logits"].dtype == np.float64
    np.testing.assert_allclose(expected["logits"], exact["logits"], atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
