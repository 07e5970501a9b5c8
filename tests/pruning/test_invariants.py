"""What holds of every router when experts go, and what does not.

That a removed row is a logit of -inf is in test_apply.py and, for graphs, in tests/graph_passes, which also have how
ties are broken (torch promises nothing of them); that no fewer than K experts stay and that groups stay whole in
tests/moe_spec/test_feasibility.py; that nothing is masked by multiplication in finetuning/test_mask.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.moe_layers import MoELayer, find_moe_layers, set_top_k
from moe_spec.layer_plan import FULL, ROWS
from pruning.apply import apply_plan
from tests.models_table import EXPERTS, TINY
from tests.oracle import plan_for

RESCALED = ("olmoe", "vmoe")
"""Softmax over all experts, and gates that are not renormalised."""

UNGROUPED = [name for name in TINY if find_moe_layers(TINY[name]())[0].groups is None]


def first_layer(model) -> MoELayer:
    return find_moe_layers(model)[0]


def route(model, hidden_TH) -> tuple[Tensor, Tensor]:
    """Gates and ids that the router of the first layer gives, (T, K) each."""
    router: Any = first_layer(model).router
    with torch.no_grad():
        _, gates_TK, ids_TK = router(hidden_TH)
    return gates_TK, ids_TK


def set_logits(model, logits_E):
    """For the hidden state (1, 0, 0, ...) the first router gives these logits, and very low ones to all others."""
    layer = first_layer(model)
    router: Any = layer.router
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = -1e4
        router.weight[: len(logits_E), 0] = torch.tensor(logits_E)
    set_top_k(model, layer, 1)
    return torch.eye(1, layer.hidden_size)


def pruned(name, keep, change=lambda _: None, router=ROWS):
    model = TINY[name]()
    change(model)
    apply_plan(model, plan_for(model, {first_layer(model).name: keep}, router=router))
    return model


@pytest.mark.parametrize("name", RESCALED)
@pytest.mark.parametrize(("router", "gate"), [(ROWS, 0.625), (FULL, 0.5)])
def test_a_gate_that_is_not_renormalised_grows_though_its_token_lost_nothing(name, router, gate):
    """Scores (.5, .3, .2), top-1: without the third expert .5 / .8."""

    def change(model):
        set_logits(model, torch.tensor([0.5, 0.3, 0.2]).log().tolist())

    keep = (0, 1, *range(3, EXPERTS))
    gates_TK, ids_TK = route(pruned(name, keep, change, router), torch.eye(1, 32))
    assert ids_TK.tolist() == [[0]]
    assert gates_TK.item() == pytest.approx(gate)


@pytest.mark.parametrize(("keep", "router", "chosen", "gate"), [((0, 1), ROWS, 1, 0.7311), ((0, 1), FULL, 2, 0.6439)])
def test_a_token_whose_expert_went_has_its_next_best_or_the_one_that_gives_nothing(keep, router, chosen, gate):
    """Logits (0, 1, 2, -1): the full softmax gives expert 1 only .2369."""
    logits_E = [0.0, 1.0, 2.0, -1.0]
    assert torch.tensor(logits_E).softmax(0)[1].item() == pytest.approx(0.2369, abs=5e-5)
    model = pruned("vmoe", keep, lambda model: set_logits(model, logits_E), router)
    gates_TK, ids_TK = route(model, torch.eye(1, 32))
    assert ids_TK.tolist() == [[chosen]]
    assert gates_TK.item() == pytest.approx(gate, abs=5e-5)
    out_TH = first_layer(model).experts(torch.ones(1, 32), ids_TK, gates_TK)
    assert bool(out_TH.any()) == (router == ROWS)


@pytest.mark.parametrize("name", UNGROUPED)
def test_tokens_that_chose_survivors_choose_them_again(name):
    keep = (0, 1, 2, 4, 5, 7)
    hidden_TH = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    before_TK, ids_TK = route(TINY[name](), hidden_TH)
    after_TK, new_TK = route(pruned(name, keep), hidden_TH)
    untouched = ~torch.isin(ids_TK, torch.tensor((3, 6))).any(dim=1)
    assert 5 < untouched.sum() < 195
    assert torch.equal(torch.tensor(keep)[new_TK][untouched], ids_TK[untouched])
    before_TK, after_TK = before_TK[untouched], after_TK[untouched]
    if name in RESCALED:
        assert (after_TK > before_TK).all()
        torch.testing.assert_close(after_TK / after_TK.sum(1, keepdim=True), before_TK / before_TK.sum(1, keepdim=True))
    else:
        torch.testing.assert_close(after_TK, before_TK)


def test_one_keep_list_cuts_the_router_and_leaves_what_all_tokens_share():
    keep = (0, 3, 4, 6)
    before, after = TINY["deepseek_v3"](), pruned("deepseek_v3", keep)
    layer = first_layer(before)
    mine, theirs = layer.router.state_dict(), first_layer(after).router.state_dict()
    assert set(mine) == {"weight", "e_score_correction_bias"}
    for name, tensor in mine.items():
        assert torch.equal(theirs[name], tensor[list(keep)])
    for name, tensor in layer.experts.named_parameters():
        assert torch.equal(first_layer(after).experts.get_parameter(name), tensor[list(keep)])
    block, cut = before.get_submodule(layer.name), after.get_submodule(layer.name)
    rest = {name: tensor for name, tensor in block.state_dict().items() if name.startswith("shared_experts")}
    assert rest
    for name, tensor in rest.items():
        assert torch.equal(cut.state_dict()[name], tensor)
    for name in ("routed_scaling_factor", "norm_topk_prob"):
        assert getattr(after.config, name) == getattr(before.config, name)
