"""Experts that are replaced by their mean outputs, from statistics to torch."""

import numpy as np
import pytest
import torch

from models.checkpoints import save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.layer_plan import REPLACE, ROWS, LayerPlan
from moe_spec.plan import PruningPlan
from moe_spec.statistics import LayerStatistics, Statistics
from pruning.apply import apply_plan
from pruning.collect import collect
from pruning.means import with_means
from pruning.options import PlanOptions
from pruning.plan import make_plan, plan
from tests.models_table import TINY, example_inputs


def statistics(tmp_path, **changed):
    """Two tokens selected expert 0, which gave (1, 3) and (3, 5); one expert 1; none expert 2."""
    sums = {
        "tokens": np.array([2.0, 1, 0]),
        "gate": np.array([0.5, 1, 0]),
        "output": np.array([[4.0, 8], [1, 1], [0, 0]]),
        "output_squared": np.array([[10.0, 34], [1, 1], [0, 0]]),
    }
    layer = LayerStatistics(
        "mlp", 3, 1, 3, {key: value for key, value in (sums | changed).items() if value is not None}
    )
    path = tmp_path / "statistics.safetensors"
    Statistics("model", ("data",), (layer,)).save(path)
    return path


def test_the_worked_example():
    """Outputs (1, 3) and (3, 5) are replaced by (2, 4); a token with the gate .25 gets (.5, 1)."""
    sums = {"tokens": np.array([2.0, 0]), "output": np.array([[4.0, 8], [0, 0]])}
    made = with_means(LayerPlan("mlp", 2, 1, (1,), router=REPLACE), LayerStatistics("mlp", 2, 1, 2, sums))
    np.testing.assert_array_equal(made.means_DH, [[2, 4]])
    np.testing.assert_array_equal(0.25 * made.mean_outputs(2), [[0.5, 1]])


def test_mone_replaces_what_it_drops_and_writes_what_by(tmp_path):
    made = plan(statistics(tmp_path), PlanOptions(1, "mone"), tmp_path / "plan.json")
    (layer,) = made.layers
    assert (layer.router, layer.keep, layer.top_k) == (REPLACE, (0,), 1)
    np.testing.assert_array_equal(layer.means_DH, [[1, 1], [0, 0]])  # no token selected the last
    assert made == PruningPlan.load(tmp_path / "plan.json")
    assert made.options["router"] == REPLACE


def test_mone_may_only_rank_and_any_criterion_replace(tmp_path):
    source = statistics(tmp_path)
    assert make_plan(source, PlanOptions(1, "mone", router=ROWS)).layers[0].router == ROWS
    (layer,) = make_plan(source, PlanOptions(2, "frequency", router=REPLACE)).layers
    np.testing.assert_array_equal(layer.means_DH, [[0, 0]])


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "plan.means.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"plan\.means\.safetensors already exists"):
        plan(statistics(tmp_path), PlanOptions(1, "mone"), tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_statistics_without_outputs_cannot_replace(tmp_path):
    with pytest.raises(UserError) as caught:
        make_plan(statistics(tmp_path, output=None), PlanOptions(1, "frequency", router=REPLACE))
    assert (caught.value.what, caught.value.hint) == (
        "the statistics of layer mlp lack 'output': sum of f_e(x) over X_e",
        "moe-edge calibrate on the checkpoint",
    )


def test_a_model_does_not_tell_what_its_experts_give(tmp_path):
    save_model(TINY["vmoe"](), tmp_path / "vmoe")
    with pytest.raises(UserError) as caught:
        make_plan(tmp_path / "vmoe", PlanOptions(2, "random", router=REPLACE))
    assert (caught.value.what, caught.value.hint) == (
        "--router replace puts an expert's mean output in its place, which a model does not tell",
        "moe-edge calibrate CHECKPOINT --data DATA.npz -o statistics.safetensors, and plan with that and a criterion "
        "that ranks by statistics",
    )


@pytest.mark.parametrize("name", ["vmoe", "gpt_oss"])
def test_a_constant_expert_is_one_without_weights_whose_bias_is_its_mean(name):
    """Collected, planned and applied; the same by hand, in families whose experts have a bias behind all products."""
    model = TINY[name]().eval()
    inputs = example_inputs(model, batch=4, sequence=6, seed=0)
    layers = collect(model, [inputs])
    plans = tuple(
        with_means(LayerPlan(layer.name, layer.experts, layer.top_k, (0, 3, 6), router=REPLACE), layer)
        for layer in layers
    )
    biased = TINY[name]().eval()
    for layer, replaced in zip(find_moe_layers(biased), plans, strict=True):
        dropped = list(replaced.dropped)
        with torch.no_grad():
            layer.experts.get_parameter("down_proj")[dropped] = 0
            layer.experts.get_parameter("down_proj_bias")[dropped] = torch.from_numpy(
                replaced.mean_outputs(layer.hidden_size)
            )
    apply_plan(model, PruningPlan("", "mone", plans))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, biased(**inputs).logits)
