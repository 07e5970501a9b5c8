"""Plans that name the experts that stay."""

import pytest

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups, Kernels
from pruning.by_hand import parse_experts, plan_by_hand
from pruning.layers import LayerShape, ModelLayers

MODEL = ModelLayers("m" * 64, (LayerShape("layers.0.mlp", 8, 2, None), LayerShape("layers.1.mlp", 8, 2, Groups(2, 1))))


def test_named_experts_stay_in_every_layer_and_in_one():
    made = plan_by_hand(MODEL, parse_experts(["5,1,1", "layers.1.mlp=0,1,4,5"]))
    assert [(layer.name, layer.keep, layer.top_k) for layer in made.layers] == [
        ("layers.0.mlp", (1, 5), 2),
        ("layers.1.mlp", (0, 1, 4, 5), 2),
    ]
    assert (made.model_sha256, made.criterion) == ("m" * 64, "by hand")


def test_a_layer_that_is_not_named_keeps_all():
    assert [layer.name for layer in plan_by_hand(MODEL, parse_experts(["layers.0.mlp=3,4"])).layers] == ["layers.0.mlp"]


def test_k_shrinks_only_when_asked():
    named = parse_experts(["layers.0.mlp=3"])
    with pytest.raises(UserError, match=r"^layer layers\.0\.mlp keeps 1 of 8 experts, but its router selects K=2"):
        plan_by_hand(MODEL, named)
    assert plan_by_hand(MODEL, named, clamp_top_k=True).layers[0].top_k == 1


@pytest.mark.parametrize(
    ("texts", "what", "hint"),
    [
        (["1;2"], "--experts 1;2 names no experts", "give ids, like --experts 0,2,5, or LAYER=0,2,5 for one layer"),
        (["1", "2"], "--experts names every layer twice", "give one list of ids for each layer"),
        (["a=1", "a=2"], "--experts names a twice", "give one list of ids for each layer"),
        (
            ["layers.7.mlp=1,2"],
            "--experts names layer 'layers.7.mlp', which the model lacks",
            "its MoE layers are: layers.0.mlp, layers.1.mlp",
        ),
        (
            ["layers.0.mlp=1,9"],
            "--experts names expert 9, but layer layers.0.mlp has 8",
            "its ids are 0 to 7",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(texts, what, hint):
    with pytest.raises(UserError) as error:
        plan_by_hand(MODEL, parse_experts(texts))
    assert (error.value.what, error.value.hint) == (what, hint)


def test_what_the_target_does_not_take_is_refused():
    gadget = Kernels("gadget", (2, 4))
    for experts, layer, count in ((["0,1,4"], 0, 3), (["layers.0.mlp=0,1"], 1, 8)):
        with pytest.raises(UserError) as caught:
            plan_by_hand(MODEL, parse_experts(experts), clamp_top_k=True, kernels=gadget)
        assert caught.value.what == f"layer layers.{layer}.mlp keeps {count} experts, target gadget takes 2 or 4"
        assert caught.value.hint == "choose another --target"
