import copy
import itertools
import re

import pytest
import torch

from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from pruning import reconstruction
from pruning.apply import apply_plan
from pruning.reconstruction import search, search_model
from tests.models_table import EXPERTS, TINY, TOP_K, example_inputs

UNGROUPED = [name for name in TINY if name != "deepseek_v3"]


def constant_experts(keep):
    """Experts that give 1, 2 and 4, top-2 renormalised, tokens with logits (2, 1, 0) and (0, 1, 2)."""
    values, logits_TE = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[2.0, 1, 0], [0, 1, 2]])
    top_TK, ids_TK = logits_TE[:, list(keep)].topk(2)
    return (top_TK.softmax(-1) * values[torch.tensor(keep)[ids_TK]]).sum(-1)


def constant_loss(keep):
    return float((constant_experts(keep) - constant_experts((0, 1, 2))).norm())


def test_constant_experts_are_kept_by_what_they_change_not_by_how_often_they_are_used():
    assert constant_experts((0, 1, 2)).tolist() == pytest.approx([1.2689, 3.4621], abs=1e-4)
    losses = {keep: constant_loss(keep) for keep in itertools.combinations(range(3), 2)}
    assert losses == pytest.approx({(0, 1): 1.7311, (0, 2): 0.2009, (1, 2): 1.2689}, abs=1e-4)
    found = search(constant_loss, 3, 2)
    assert (found.keep, found.exact) == ((0, 2), True)
    assert found.scores == pytest.approx((1.2689, 0.2009, 1.7311), abs=1e-4)


def test_the_first_of_equal_subsets_is_kept():
    assert search(lambda _: 0.0, 4, 2).keep == (0, 1)


def test_too_many_subsets_are_not_all_tried(monkeypatch):
    weights = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
    asked = []

    def loss(keep):
        asked.append(keep)
        return float(weights.sum() - weights[list(keep)].sum())

    monkeypatch.setattr(reconstruction, "MAX_SUBSETS", 69)
    found = search(loss, 8, 4)
    assert (found.keep, found.exact, found.loss) == ((2, 4, 5, 7), False, 7.0)
    assert len(set(asked)) < 70


def test_keeping_all_loses_nothing():
    assert search(constant_loss, 3, 3) == reconstruction.Found((0, 1, 2), (0.0, 0.0, 0.0), exact=True, loss=0.0)


@pytest.mark.parametrize("name", UNGROUPED)
def test_the_loss_is_the_change_of_what_the_pruned_layer_gives(name):
    model = TINY[name]()
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    counts = [5, 8]
    found = search_model(model, [inputs], counts)
    assert [len(one.keep) for one in found] == counts
    layer = find_moe_layers(model)[0]  # the first reads the same hidden states before and after pruning
    pruned = copy.deepcopy(model)
    apply_plan(pruned, PruningPlan("model", "naee", (LayerPlan(layer.name, EXPERTS, TOP_K, found[0].keep),)))
    outputs = []
    for each in (model, pruned):
        hook = find_moe_layers(each)[0].experts.register_forward_hook(lambda *call: outputs.append(call[-1]))
        with torch.no_grad():
            each(**inputs)
        hook.remove()
    assert found[0].loss == pytest.approx(float((outputs[0] - outputs[1]).norm()), rel=1e-4)


def test_padding_is_not_looked_at():
    model = TINY["mixtral"]()
    inputs = example_inputs(model, batch=2, sequence=6, seed=0)
    padded = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in inputs.items()}
    for mine, theirs in zip(*(search_model(model, [batch], [4, 4]) for batch in (padded, inputs)), strict=True):
        assert mine.keep == theirs.keep
        assert mine.scores == pytest.approx(theirs.scores, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "count", "what"),
    [
        ("deepseek_v3", 4, "routes in 2 groups, and subsets of its experts would break them"),
        ("mixtral", 1, "would keep 1 of 8 experts, but its router selects K=2 a token"),
        ("mixtral", 9, "would keep 9 of 8 experts, but its router selects K=2 a token"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(name, count, what):
    model = TINY[name]()
    layer = find_moe_layers(model)[0].name
    with pytest.raises(UserError, match=re.escape(f"layer {layer} {what}")):
        search_model(model, iter(()), [count, count])


def test_outputs_that_are_not_finite_are_refused():
    model = TINY["mixtral"]()
    layer = find_moe_layers(model)[0]
    layer.experts.get_parameter("down_proj").data[3] = torch.inf
    with pytest.raises(UserError) as caught:
        search_model(model, [example_inputs(model, batch=2, sequence=6, seed=0)], [4, 4])
    assert caught.value.what == (
        f"the statistics of layer {layer.name} are not finite: the model overflowed on the calibration data"
    )
