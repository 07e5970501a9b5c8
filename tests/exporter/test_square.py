"""The square: pruning before the export and after it is one graph in two ways, whatever the router and the plan.

    checkpoint --prune--> smaller model
        |                      |
      export                 export
        v                      v
    model.onnx --optimize-> the same numbers

The third witness is torch, its dropped experts unselectable, or merged in memory.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from exporter.export import export
from exporter.tasks import task_of
from exporter.trace import run_torch
from graph_passes.optimize import optimize
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import ALIAS, FULL, MEAN, ROWS, LayerPlan, Merge
from moe_spec.manifest import MODEL, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from pruning.apply import apply_plan
from tests.oracle import masked, with_any_means
from tests.zoo import RUNNER

UNEVEN = (0, 1, 5), (6,)
"""Three experts in the first layer; one in the second, whose K shrinks and whose router has nothing to choose."""

FAMILIES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "mixtral": UNEVEN,  # softmax, renormalised
    "qwen2_moe": UNEVEN,  # softmax as it is; a shared expert with a gate
    "deepseek_v3": ((0, 2, 5, 7), (1, 2, 3)),  # sigmoid, selection bias, groups: equal ones, of two experts or more
    "gpt_oss": UNEVEN,  # top-k before softmax; biases, gate and up in turns
    "aria": UNEVEN,  # transposed, a shared expert
    "vmoe": UNEVEN,  # images; no gate projection
    "moe_bert": UNEVEN,  # a classifier of texts
}
"""What is kept, by family: together all that routers and experts of transformers differ in."""

BEHIND = ("mixtral", "vmoe")
"""Families of which the first layer's router stays full, and what the second one's chose is replaced by its mean."""

UNEVEN_GROUPS = {0: (0, 3, 4), 1: (1,), 5: (2, 5, 6, 7)}, {6: tuple(range(8))}
"""Who becomes one with whom, by survivor: again three experts in the first layer, and one in the second."""

MERGED: Mapping[str, tuple[str, Sequence[Mapping[int, tuple[int, ...]]]]] = {
    "mixtral": (ALIAS, UNEVEN_GROUPS),
    "qwen2_moe": (MEAN, UNEVEN_GROUPS),
    "deepseek_v3": (MEAN, ({0: (0, 1), 2: (2, 3), 5: (4, 5), 7: (7,)}, {1: (0, 1), 2: (2,), 3: (3,)})),
    "gpt_oss": (ROWS, UNEVEN_GROUPS),
    "aria": (MEAN, UNEVEN_GROUPS),
    "vmoe": (ALIAS, UNEVEN_GROUPS),
    "moe_bert": (ROWS, UNEVEN_GROUPS),
}
"""What becomes of the router, and of the experts, whose neurons are aligned; those that are in no group are dropped."""

SHAPES = ((1, 1), (3, 9))
"""Batch and sequence; neither was traced."""

TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Square:
    """One family, pruned on both ways.

    Attributes:
        before: directory of the export of the pruned model.
        after: directory of the pruned export.
    """

    checkpoint: Path
    plan: PruningPlan
    before: Path
    after: Path


def plan_of(checkpoint: Path, keeps) -> PruningPlan:
    """What to keep in each layer, as `UNEVEN` does; K shrinks with it."""
    layers = zip(find_moe_layers(load_model(checkpoint)), keeps, strict=True)
    plans = [
        LayerPlan(layer.name, layer.num_experts, min(layer.top_k, len(keep)), keep, groups=layer.groups)
        for layer, keep in layers
    ]
    return PruningPlan(checkpoint_sha256(checkpoint), "by hand", tuple(plans))


def plan_behind(checkpoint: Path) -> PruningPlan:
    """As many experts in each layer as `UNEVEN` has, and all rows of both routers."""
    model = load_model(checkpoint)
    layers = zip(find_moe_layers(model), UNEVEN, strict=True)
    silent, replaced = (
        LayerPlan(layer.name, layer.num_experts, layer.top_k, keep, groups=layer.groups, router=FULL)
        for layer, keep in layers
    )
    replaced = with_any_means(replaced, model.config.hidden_size)
    return PruningPlan(checkpoint_sha256(checkpoint), "by hand", (silent, replaced))


def plan_merging(checkpoint: Path, router: str, groups_of_layers) -> PruningPlan:
    """Groups become one, of which experts with higher ids count for more."""
    plans = []
    for layer, groups in zip(find_moe_layers(load_model(checkpoint)), groups_of_layers, strict=True):
        merges = tuple(Merge(ids, tuple(0.3 + 0.1 * expert for expert in ids)) for ids in groups.values())
        top_k = layer.top_k if router == ALIAS else min(layer.top_k, len(groups))
        plans.append(
            LayerPlan(layer.name, 8, top_k, tuple(groups), (), layer.groups, router=router, merge=merges, align=True)
        )
    return PruningPlan(checkpoint_sha256(checkpoint), "by hand", tuple(plans))


def export_pruned(checkpoint: Path, plan: PruningPlan, out: Path) -> Manifest:
    return export(checkpoint, out, RUNNER, plan=plan, prepare=functools.partial(apply_plan, plan=plan), cache=False)


@pytest.fixture(scope="module")
def square(request, zoo, tmp_path_factory) -> Square:
    name, planned = request.param
    checkpoint, root = zoo.checkpoint(name), tmp_path_factory.mktemp(name)
    plan = planned(checkpoint)
    export_pruned(checkpoint, plan, root / "before")
    if plan.shares_experts:  # it has the mean once for every row
        (root / "before").rename(root / "copies")
        optimize(root / "copies", root / "before", RUNNER, plan=plan, prove=False)
    optimize(zoo.exported(name), root / "after", RUNNER, plan=plan)
    return Square(checkpoint, plan, root / "before", root / "after")


NARROWED = {name: (name, functools.partial(plan_of, keeps=keeps)) for name, keeps in FAMILIES.items()}
LED = {f"{name} behind its routers": (name, plan_behind) for name in BEHIND}
AVERAGED = {
    f"{name} merged": (name, functools.partial(plan_merging, router=router, groups_of_layers=groups))
    for name, (router, groups) in MERGED.items()
}
SQUARES = NARROWED | LED | AVERAGED

every_square = pytest.mark.parametrize("square", SQUARES.values(), ids=SQUARES, indirect=True)
uneven = {name: square for name, square in NARROWED.items() if FAMILIES[name] == UNEVEN}


def batches_of(checkpoint: Path):
    model = load_model(checkpoint)
    rng = np.random.default_rng(5)
    return [task_of(type(model).__name__).example(model.config, *shape, rng) for shape in SHAPES]


def expected_of(square: Square, batches):
    """What torch gives with the dropped experts masked, or with those that are merged as they become."""
    model = load_model(square.checkpoint)
    if square.plan.merges:
        apply_plan(model, square.plan)
        return [run_torch(model, task_of(type(model).__name__), feeds) for feeds in batches]
    with masked(model, square.plan):
        return [run_torch(model, task_of(type(model).__name__), feeds) for feeds in batches]


def assert_equal(first, second) -> None:
    for one, other in zip(first, second, strict=True):
        assert set(one) == set(other)
        for output, value in one.items():
            assert error_between(value, other[output])[1] <= TOLERANCE


@every_square
def test_pruning_before_the_export_is_pruning_after(square):
    batches = batches_of(square.checkpoint)
    before, after = (RUNNER.run(directory / MODEL, batches) for directory in (square.before, square.after))
    assert_equal(before, after)
    assert_equal(expected_of(square, batches), before)


@every_square
def test_both_ways_keep_the_same_experts_and_are_the_same_model(square):
    before, after = (Manifest.load(directory) for directory in (square.before, square.after))
    for manifest in (before, after):
        assert [(block.experts, block.keep) for block in manifest.blocks] == [
            (len(layer.keep), layer.keep) for layer in square.plan.layers
        ]
    assert before.model_sha256 == after.model_sha256


@pytest.mark.parametrize("square", uneven.values(), ids=uneven, indirect=True)
def test_no_router_is_left_where_one_expert_is(square, tmp_path):
    optimize(square.before, tmp_path / "optimized", RUNNER, accepted=("dense", "ffn"))
    for directory in (square.after, tmp_path / "optimized"):
        block = Manifest.load(directory).blocks[1]
        assert (block.form, block.router, block.experts) == ("ffn", "", 1)
    batches = batches_of(square.checkpoint)
    assert_equal(RUNNER.run(tmp_path / "optimized" / MODEL, batches), RUNNER.run(square.after / MODEL, batches))


def test_a_group_of_one_expert_is_for_the_graph(zoo, tmp_path):
    """Torch scores a group by its two best; what is left of it can still be pruned in ONNX."""
    checkpoint = zoo.checkpoint("deepseek_v3")
    plan = plan_of(checkpoint, UNEVEN)
    with pytest.raises(UserError) as refusal:
        export_pruned(checkpoint, plan, tmp_path / "before")
    assert (refusal.value.what, refusal.value.hint) == (
        "layer model.layers.0.mlp keeps [2, 1] experts in its 2 routing groups, but a torch router needs the same "
        "number in each, at least 2",
        "prune the ONNX graph, which has no such limit: moe-edge optimize exported/ --plan plan.json",
    )
    assert not (tmp_path / "before").exists()
