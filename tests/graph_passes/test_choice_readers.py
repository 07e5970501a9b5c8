"""A choice among all experts must not outlive the experts."""

import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from tests.graph_passes.block_models import Spec, plan, save
from tests.zoo import RUNNER

HINT = "export the model without its routers' choices among the outputs"


def showing(tmp_path, value: str, dtype: int):
    """A block whose value ``value`` is an output too."""
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(value, dtype, None))
    onnx.save(model, path)
    return path


def test_an_output_that_shows_the_choice_of_a_pruned_layer_is_refused(tmp_path):
    source = showing(tmp_path, "ids", onnx.TensorProto.INT64)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, plan=plan(Spec(), (1, 3), onnx_sha256(source)))
    assert error.value.what == (
        "output 'ids' shows what the router of layer layers.0.mlp chooses, which changes when experts go"
    )
    assert error.value.hint == HINT
    assert not (tmp_path / "out").exists()


def test_it_stays_where_no_expert_goes(tmp_path):
    source = showing(tmp_path, "ids", onnx.TensorProto.INT64)
    manifest = optimize(source, tmp_path / "out", RUNNER, form="sorted")
    assert [output.name for output in manifest.outputs] == ["out", "ids"]


def test_logits_that_are_an_output_keep_a_column_for_every_expert(tmp_path):
    source = showing(tmp_path, "logits", onnx.TensorProto.FLOAT)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(Spec(), (1, 3), onnx_sha256(source)))
    assert [output.name for output in manifest.outputs] == ["out", "logits"]
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5


def test_a_real_export_with_its_routers_weights_among_the_outputs_is_refused(zoo, tmp_path):
    source = zoo.foreign("grouped_gpt_oss")
    model = read_model(source)
    layers = tuple(LayerPlan(block.name, 8, 2, (1, 3, 5)) for block in model.blocks)
    with pytest.raises(UserError, match=r"^output '.*' shows what the router of layer .* chooses"):
        optimize(source, tmp_path / "out", RUNNER, plan=PruningPlan(model.source_sha256, "by hand", layers))
