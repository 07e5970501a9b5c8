import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.layer_plan import LayerPlan, Merge
from moe_spec.plan import PruningPlan

REMAKE = "make it again with `moe-edge plan`"
IMPOSSIBLE = "layer layers.0.mlp cannot route 8 experts in {} groups of which {} are selected"
LAYERS = (
    LayerPlan("layers.0.mlp", 8, 2, (0, 3, 5), (0.5, 0.1, 0.2, 0.9, 0.0, 1.0, 0.3, 0.2)),
    LayerPlan("layers.1.mlp", 8, 1, (0, 1, 4, 5), groups=Groups(2, 1)),
)
PLAN = PruningPlan("model", "reap", LAYERS, {"keep": 0.5, "scope": "layer"}, "statistics")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    return path


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refusal(path):
    with pytest.raises(UserError) as caught:
        PruningPlan.load(path)
    return caught.value.what, caught.value.hint


def test_what_is_saved_is_loaded_again(path):
    assert PruningPlan.load(path) == PLAN


@given(st.data())
def test_any_plan_comes_back_as_it_was(tmp_path_factory, data):
    experts = data.draw(st.integers(1, 12))
    keep = tuple(sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1))))
    scores = data.draw(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=experts, max_size=experts))
    layer = LayerPlan(data.draw(st.text()), experts, data.draw(st.integers(1, len(keep))), keep, tuple(scores))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = PruningPlan("model", "reap", (layer,), data.draw(st.dictionaries(st.text(), st.integers() | st.text())))
    plan.save(path)
    assert PruningPlan.load(path) == plan


def test_a_layer_knows_what_it_drops():
    assert LAYERS[0].dropped == (1, 2, 4, 6, 7)
    assert PLAN.layer("layers.1.mlp") is PLAN.layers[1]
    assert PLAN.layer("layers.2.mlp") is None


def test_a_plan_is_for_one_model():
    PLAN.require_model("model", "checkpoint")
    message = "the plan was made for model model, but checkpoint is model 0123456789ab"
    with pytest.raises(UserError, match=re.escape(message)):
        PLAN.require_model("0123456789abcdef", "checkpoint")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("keep", [5, 3, 0], "layer layers.0.mlp keeps [5, 3, 0], expected ascending, distinct ids from 0 to 7"),
        ("keep", [], "layer layers.0.mlp keeps no expert"),
        ("keep", [3], "layer layers.0.mlp keeps 1 of 8 experts, but its router selects K=2 a token"),
        ("keep", [0, "3"], "{path}: layers[0]: key 'keep' holds '3', expected int"),
        ("scores", [1, "high"], "{path}: layers[0]: key 'scores' holds 'high', expected float"),
        ("scores", [1.0], "layer layers.0.mlp has 1 scores for 8 experts"),
        ("top_k", 0, "layer layers.0.mlp selects K=0 experts, expected at least 1"),
        ("name", 0, "{path}: layers[0]: key 'name' holds 0, expected str"),
        ("groups", {"count": 2}, "{path}: layers[0]: groups: key 'selected' is missing"),
        ("groups", {"count": 3, "selected": 1}, IMPOSSIBLE.format(3, 1)),
        ("groups", {"count": 0, "selected": 0}, IMPOSSIBLE.format(0, 0)),
        ("groups", {"count": 2, "selected": 3}, IMPOSSIBLE.format(2, 3)),
    ],
)
def test_a_plan_that_was_edited_into_nonsense_is_refused(key, value, what, path):
    edit(path, lambda plan: plan["layers"][0].update({key: value}))
    assert refusal(path)[0] == what.format(path=path)


def test_a_layer_that_stands_twice_is_refused(path):
    edit(path, lambda plan: plan["layers"].append(plan["layers"][0]))
    assert refusal(path) == (f"{path}: layer 'layers.0.mlp' is planned twice", REMAKE)


@pytest.mark.parametrize("key", ["model_sha256", "criterion", "options", "layers"])
def test_a_plan_without_a_key_is_refused(key, path):
    edit(path, lambda plan: plan.pop(key))
    assert refusal(path) == (f"{path}: key {key!r} is missing", REMAKE)


def test_a_router_that_stays_full_may_select_more_than_stay():
    assert LayerPlan("mlp", 8, 2, (3,), router="full").top_k == 2


@pytest.mark.parametrize(
    ("router", "merge"), [("mean", ()), ("new", ()), ("full", (Merge((0, 1), (1, 1)),)), ("none", ())]
)
def test_a_router_that_does_not_go_with_dropping_or_merging_is_refused(router, merge):
    kind = "merges" if merge else "drops"
    with pytest.raises(UserError, match=re.escape(f"layer mlp {kind} experts with the router {router!r}")):
        LayerPlan("mlp", 8, 1, (0,), router=router, merge=merge)


@pytest.mark.parametrize(
    "merge",
    [
        (Merge((0, 1), (1, 1)),),
        (Merge((0, 1), (1, 1)), Merge((1, 4), (1, 1))),
        (Merge((0, 1), (1, 1)), Merge((3,), (1,))),
        (Merge((0, 9), (1, 1)), Merge((4,), (1,))),
        (Merge((0, 1), (0, 0)), Merge((4,), (1,))),
        (Merge((0, 1), (1, -1)), Merge((4,), (1,))),
        (Merge((0, 1), (1,)), Merge((4,), (1,))),
    ],
)
def test_a_merge_that_cannot_be_is_refused(merge):
    found = [list(one.experts) for one in merge]
    with pytest.raises(UserError, match=re.escape(f"layer mlp keeps [0, 4] but merges {found}")):
        LayerPlan("mlp", 8, 1, (0, 4), merge=merge)


def test_a_plan_that_merges_comes_back_as_it_was(tmp_path):
    merge = (Merge((0, 1, 2), (3, 1, 0)), Merge((3, 4), (1, 1)))
    plan = PruningPlan("model", "uncurl", (LayerPlan("mlp", 5, 1, (0, 4), router="new", merge=merge, align=True),))
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
