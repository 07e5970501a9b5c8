"""A trace is not trusted: graphs that lost something, or that compute something else, are found out."""

import numpy as np
import onnx
import pytest

from exporter.check import SHAPES, check_experts, check_parity
from exporter.tasks import task_of
from models.checkpoints import load_model, load_skeleton
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError, VerificationError
from moe_spec.manifest import MODEL
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
        return [{name: self._alter(array) for name, array in result.items()} for result in results]


def parity(zoo, runner, name="vmoe"):
    model = load_model(zoo.checkpoint(name))
    return check_parity(model, task_of(type(model).__name__), zoo.exported(name) / MODEL, runner)


def test_the_errors_at_every_shape_are_reported(zoo):
    report = parity(zoo, RUNNER)
    assert [(entry["shape"], entry["output"]) for entry in report] == [(list(shape), "logits") for shape in SHAPES]
    assert all(entry["max_rel"] <= 1e-5 for entry in report)


@pytest.mark.parametrize(
    ("alter", "error"), [(lambda array: array * np.float32(1.001), "1.00e-03"), (lambda array: array * np.nan, "inf")]
)
def test_a_wrong_output_is_a_failed_verification(alter, error, zoo):
    with pytest.raises(VerificationError) as failure:
        parity(zoo, Altered(alter))
    assert str(failure.value) == (
        f"output logits differs from torch by {error} of its range at batch and sequence (1, 1), allowed is 1e-05"
    )


def test_a_static_axis_is_a_failed_verification(zoo):
    with pytest.raises(VerificationError) as failure:
        parity(zoo, Altered(lambda array: array[:2]))
    assert str(failure.value) == (
        "an axis came out static: output logits has shape (2, 10) for batch and sequence (3, 7), torch gives (3, 10)"
    )
