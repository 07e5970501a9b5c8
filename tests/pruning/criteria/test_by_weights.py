"""What weights say of experts, without data."""

import copy

import numpy as np
import pytest
import torch

from models.checkpoints import save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from pruning.criteria.by_weights import aimer, router_norm
from tests.models_table import TINY


def saved(name, directory, change):
    """A tiny checkpoint whose MoE layers went through ``change``."""
    model = TINY[name]()
    with torch.no_grad():
        for layer in find_moe_layers(model):
            change(layer)
    save_model(model, directory)
    return directory


def fill_experts(layer):
    """Expert 0 all ones, 1 and 2 one value in four, at two scales, 3 zeros; the rest as it was."""
    for matrix_E in layer.experts.parameters():
        one_in_four = torch.arange(matrix_E[0].numel()).reshape(matrix_E[0].shape) % 4 == 0
        matrix_E[0] = 1
        matrix_E[1], matrix_E[2] = 2 * one_in_four, -20 * one_in_four
        matrix_E[3] = 0


@pytest.mark.parametrize("name", ["mixtral", "vmoe", "gpt_oss"])
def test_aimer_sees_how_unevenly_large_weights_are_whatever_their_scale(name, tmp_path):
    for scores in aimer(saved(name, tmp_path / name, fill_experts)):
        np.testing.assert_allclose(scores[:4], (-1.0, -0.5, -0.5, -1.0))
        # of normal weights the ratio is sqrt(2 / pi)
        np.testing.assert_allclose(scores[4:], -np.sqrt(2 / np.pi), atol=0.02)


def set_rows(rows, others=1.0):
    """Rows of a router in its first two columns; those that are not given have a length that stays."""

    def change(layer):
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = others
        layer.router.weight[: len(rows), :2] = torch.tensor(rows)

    return change


PRETRAINED = ((3.0, 4.0), (0.0, 2.0), (1.0, 0.0), (6.0, 8.0))
FINE_TUNED = ((3.6, 4.8), (0.0, 5.0), (0.0, 1.5), (3.0, 4.0))


def test_router_norm_is_the_signed_change_of_the_length(tmp_path):
    """The size of the change would keep experts 0, 1 and 3; the length of the difference 1, 2 and 3."""
    before = saved("vmoe", tmp_path / "before", set_rows(PRETRAINED))
    after = saved("vmoe", tmp_path / "after", set_rows(FINE_TUNED))
    for scores in router_norm(after, before):
        np.testing.assert_allclose(scores, (1, 3, 0.5, -5, 0, 0, 0, 0), atol=1e-6)
        assert set(np.argsort(-scores)[:3]) == {0, 1, 2}


def test_the_same_routers_before_and_after_rank_nothing(tmp_path):
    before = saved("vmoe", tmp_path / "before", set_rows(PRETRAINED))
    after = saved("vmoe", tmp_path / "after", set_rows(tuple((-y, x) for x, y in PRETRAINED)))
    with pytest.raises(UserError) as caught:
        router_norm(after, before)
    assert caught.value.what == f"no router row of {after} is longer or shorter than in {before}"
    assert caught.value.hint == (
        "--pretrained takes the checkpoint before fine-tuning; where routers were frozen, rank by statistics"
    )


@pytest.mark.parametrize(
    ("here", "there", "what"),
    [
        (
            "mixtral",
            "granitemoe",
            "the router of layer model.layers.0.mlp has no rows in {there}, but 8 rows of 32 in {here}",
        ),
        ("vmoe", "mixtral", "the router of layer layers.1.mlp has no rows in {there}, but 8 rows of 32 in {here}"),
    ],
)
def test_other_routers_are_refused(here, there, what, tmp_path):
    for name in (here, there):
        save_model(TINY[name](), tmp_path / name)
    with pytest.raises(UserError) as caught:
        router_norm(tmp_path / here, tmp_path / there)
    assert caught.value.what == what.format(here=tmp_path / here, there=tmp_path / there)
    assert caught.value.hint == "--pretrained takes the checkpoint that this one was fine-tuned from"


def test_more_layers_or_fewer_experts_before_are_refused(tmp_path):
    after, model = tmp_path / "after", TINY["olmoe"]()
    save_model(model, after)
    for key, value, what in (
        ("num_hidden_layers", 3, "the router of layer model.layers.2.mlp has 8 rows of 32 in {}, but no rows in {}"),
        ("num_experts", 4, "the router of layer model.layers.0.mlp has 4 rows of 32 in {}, but 8 rows of 32 in {}"),
    ):
        before, config = tmp_path / key, copy.deepcopy(model.config)
        setattr(config, key, value)
        save_model(type(model)(config), before)
        with pytest.raises(UserError) as caught:
            router_norm(after, before)
        assert caught.value.what == what.format(before, after)


def spoil(layer):
    layer.router.weight[3, 0] = torch.nan
    next(layer.experts.parameters())[3, 0] = torch.inf


def test_weights_that_are_not_finite_are_refused(tmp_path):
    before = saved("vmoe", tmp_path / "before", set_rows(PRETRAINED))
    after = saved("vmoe", tmp_path / "after", spoil)
    for rank in (lambda: aimer(after), lambda: router_norm(after, before)):
        with pytest.raises(UserError) as caught:
            rank()
        assert caught.value.what == f"the weights of layer layers.1.mlp in {after} are not finite"
