from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.feasibility import Kernels
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.budget.cost import by_size
from pruning.budget.limit import AtMost
from pruning.calibrate import calibrate
from pruning.merging.mergers import MERGERS
from pruning.options import PlanOptions
from pruning.plan import make_plan
from pruning.plan_on_data import DataOptions, plan_on_data
from pruning.reconstruction import search_model
from tests.heard import Heard
from tests.models_table import TINY, vmoe_expert_choice

ROUNDS_REFUSED = "--scope {} --router {} cannot be searched for or come to in rounds"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints by family, and token ids for all of them."""
    directory = tmp_path_factory.mktemp("files")
    for name in ("mixtral", "deepseek_v3"):
        save_model(TINY[name](), directory / name)
    ids = np.random.default_rng(0).integers(0, 128, (6, 5), dtype=np.int64)
    np.savez_compressed(directory / "data.npz", input_ids=ids)
    return directory


def plan(files, tmp_path, options, name="mixtral", **how):
    return plan_on_data(files / name, files / "data.npz", options, tmp_path / "plan.json", DataOptions(**how))


def test_one_round_is_calibrating_and_planning(files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(3, "gate-mass"), batch_size=2)
    calibrate(files / "mixtral", files / "data.npz", tmp_path / "s.safetensors", batch_size=2)
    expected = make_plan(tmp_path / "s.safetensors", PlanOptions(3, "gate-mass"))
    assert [layer.keep for layer in made.layers] == [layer.keep for layer in expected.layers]
    np.testing.assert_allclose([made.layers[0].scores], [expected.layers[0].scores], rtol=1e-9)
    assert PruningPlan.load(tmp_path / "plan.json") == made
    assert made.options["rounds"] == 1


@pytest.mark.parametrize("merger", MERGERS)
def test_merging_on_data_is_calibrating_and_planning(merger, files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(3, merger), batch_size=2)
    calibrate(files / "mixtral", files / "data.npz", tmp_path / "s.safetensors", batch_size=2, dense=True)
    expected = make_plan(tmp_path / "s.safetensors", PlanOptions(3, merger))
    assert made.merges
    for mine, theirs in zip(made.layers, expected.layers, strict=True):
        assert (mine.keep, mine.router, mine.align) == (theirs.keep, theirs.router, theirs.align)
        assert [merge.experts for merge in mine.merge] == [merge.experts for merge in theirs.merge]
    apply_plan(load_model(files / "mixtral"), made)


def test_in_rounds_the_pruned_model_is_looked_at_again(files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(3, "reap"), rounds=2)
    model = load_model(files / "mixtral")
    kept: dict[str, tuple[int, ...]] = {}
    for step, count in enumerate((6, 3)):  # 8 - 5 / 2 rounded up, then what was asked for
        save_model(model, tmp_path / str(step))
        statistics = tmp_path / f"{step}.safetensors"
        calibrate(tmp_path / str(step), files / "data.npz", statistics)
        part = make_plan(statistics, PlanOptions(count, "reap"))
        apply_plan(model, part)
        for layer in part.layers:
            before = kept.get(layer.name, tuple(range(8)))
            kept[layer.name] = tuple(before[expert] for expert in layer.keep)
    assert {layer.name: layer.keep for layer in made.layers} == kept
    assert [layer.experts for layer in made.layers] == [8, 8]
    apply_plan(load_model(files / "mixtral"), made)


def test_rounds_keep_routing_groups_whole(files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(4, "reap"), "deepseek_v3", rounds=3)
    for layer in made.layers:
        assert layer.groups is not None
        assert layer.groups.survivors(layer.keep, 8) == [2, 2]


def test_a_plan_that_only_a_graph_can_carry_out_is_made(files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(1, clamp_top_k=True), "deepseek_v3")
    assert [(len(layer.keep), layer.top_k) for layer in made.layers] == [(1, 1)] * 2


def test_naee_keeps_what_its_search_finds(files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(0.5, "naee"), limit=4)
    model = load_model(files / "mixtral")
    ids = np.load(files / "data.npz")["input_ids"][:4]
    found = search_model(model, [{"input_ids": torch.from_numpy(ids)}], [4, 4])
    assert [layer.keep for layer in made.layers] == [one.keep for one in found]
    assert made.options["exact"] == [True, True]
    assert [layer.name for layer in made.layers] == [layer.name for layer in find_moe_layers(model)]


def test_progress_counts_the_examples_of_all_rounds(files, tmp_path):
    heard = Heard()
    plan_on_data(
        files / "mixtral", files / "data.npz", PlanOptions(4), tmp_path / "plan.json",
        DataOptions(rounds=2, batch_size=4), on_progress=heard,
    )  # fmt: skip
    assert heard.counts("looking at the data") == [(4, 12), (6, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize(
    ("options", "how", "what"),
    [
        (PlanOptions(4, "random"), {}, "criterion 'random' does not look at data"),
        (PlanOptions(4), {"rounds": 0}, "--rounds 0 is no number of rounds"),
        (PlanOptions(4, "uncurl"), {"rounds": 2}, "criterion 'uncurl' merges experts, which is done in one round"),
        (PlanOptions(4, "naee"), {"rounds": 2}, "criterion 'naee' searches once, for the K of the model"),
        (PlanOptions(1, "naee", clamp_top_k=True), {}, "criterion 'naee' searches once, for the K of the model"),
        (
            PlanOptions(4, "naee", protect=True),
            {},
            "--protect keeps super experts whatever they score, but criterion 'naee' ranks nothing by scores",
        ),
        (PlanOptions(4, scope="model"), {}, "'model' is no scope"),
        (PlanOptions(4, pretrained=Path("base")), {}, "criterion 'reap' compares with no other checkpoint"),
        (PlanOptions(4, scope="global"), {"rounds": 2}, ROUNDS_REFUSED.format("global", "rows")),
        (PlanOptions(4, router="full"), {"rounds": 2}, ROUNDS_REFUSED.format("layer", "full")),
        (PlanOptions(4, "naee", router="full"), {}, ROUNDS_REFUSED.format("layer", "full")),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, how, what, files, tmp_path):
    with pytest.raises(UserError) as caught:
        plan(files, tmp_path, options, **how)
    assert caught.value.what == what
    assert not (tmp_path / "plan.json").exists()


GADGET = Kernels("gadget", (3, 6))
FIRST = "layer model.layers.0.mlp"


@pytest.mark.parametrize(
    ("name", "options", "rounds", "what"),
    [
        ("mixtral", PlanOptions(9), 1, f"--keep 9 asks for 9 experts, but {FIRST} has 8"),
        ("mixtral", PlanOptions(1), 2, f"{FIRST} keeps 1 of 8 experts, but its router selects K=2 a token"),
        ("mixtral", PlanOptions(1, scope="global"), 1, "--keep 1 leaves 2 experts for 2 layers, which need at least 4"),
        ("mixtral", PlanOptions(2, floor=3), 1, f"{FIRST} keeps 2 of 8 experts, the floor is 3"),
        ("mixtral", PlanOptions(2, "naee", floor=3), 1, f"{FIRST} keeps 2 of 8 experts, the floor is 3"),
        ("mixtral", PlanOptions(4, floor=9), 1, f"--floor 9 asks for 9 experts, but {FIRST} has 8"),
        ("mixtral", PlanOptions(4, kernels=GADGET), 2, f"{FIRST} keeps 4 experts, target gadget takes 3 or 6"),
        (
            "mixtral",
            PlanOptions(6, scope="global", kernels=GADGET),
            1,
            "--scope global --router rows cannot be had on target gadget: it builds from a checkpoint, where every "
            "layer has as many experts, and its router as many rows",
        ),
        (
            "mixtral",
            PlanOptions(1, "naee"),
            1,
            f"{FIRST} would keep 1 of 8 experts, but its router selects K=2 a token",
        ),
        (
            "deepseek_v3",
            PlanOptions(1, "m-smoe", clamp_top_k=True),
            1,
            f"{FIRST} merges its experts into 1, but has 2 routing groups: experts of different groups cannot become "
            "one",
        ),
        (
            "deepseek_v3",
            PlanOptions(4, "naee"),
            1,
            f"{FIRST} routes in 2 groups, and subsets of its experts would break them",
        ),
        (
            "deepseek_v3",
            PlanOptions(5),
            1,
            f"{FIRST} keeps 5 of 8 experts, but its router selects K=2 from 1 of 2 groups: every group "
            "must keep the same number, and enough of them",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_data_is_read(name, options, rounds, what, files, tmp_path):
    with pytest.raises(UserError) as caught:
        plan_on_data(files / name, tmp_path / "nothing.npz", options, tmp_path / "plan.json", DataOptions(rounds))
    assert caught.value.what == what


def test_a_share_is_rounded_to_what_the_target_takes_and_rounds_lead_there(files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(0.5, kernels=GADGET), rounds=2)
    assert [len(layer.keep) for layer in made.layers] == [3, 3]
    assert (made.options["target"], made.options["floor"]) == ("gadget", 1)


@pytest.fixture(scope="module")
def uneven(files):
    """A checkpoint whose first layer has one expert, eight times, so that dropping any of them changes nothing."""
    model = TINY["mixtral"]()
    for parameter in find_moe_layers(model)[0].experts.parameters():
        parameter.data[:] = parameter.data[:1].clone()
    save_model(model, files / "uneven")
    return files / "uneven"


def test_a_search_keeps_experts_where_they_differ(uneven, files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(0.5, scope="searched"), uneven.name, batch_size=4)
    assert [len(layer.keep) for layer in made.layers] == [2, 6]
    accepted = made.options["search"]["acceptance"]
    assert accepted["searched"] > accepted["layer"] + 0.01
    assert accepted["searched"] >= accepted["global"]
    assert made.options["search"]["trials"] == 5  # (2, 6), (3, 5), (4, 4), (5, 3), (6, 2)
    assert made.options["budget"] == {"written": "0.5", "unit": "experts", "most": 8, "spent": 8, "whole": 16}
    assert PruningPlan.load(tmp_path / "plan.json") == made


def test_what_a_search_says_of_a_plan_is_what_the_pruned_model_does(uneven, files, tmp_path):
    made = plan(files, tmp_path, PlanOptions(0.5, scope="searched"), uneven.name)
    whole, pruned = load_model(uneven), load_model(uneven)
    apply_plan(pruned, made)
    ids = torch.from_numpy(np.load(files / "data.npz")["input_ids"])
    with torch.no_grad():
        said = [model(input_ids=ids).logits.softmax(dim=-1) for model in (whole, pruned)]
    expected = float(torch.minimum(*said).sum(dim=-1).mean())
    assert made.options["search"]["acceptance"]["searched"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global", "searched"])
def test_any_scope_stays_within_a_size(scope, uneven, files, tmp_path):
    at_most = AtMost.parse("70%", "bytes")
    made = plan(files, tmp_path, PlanOptions(1.0, scope=scope), uneven.name, at_most=at_most, trials=8)
    counts = [len(layer.keep) for layer in made.layers]
    costs = by_size(uneven)
    one_more = (2 if scope == "layer" else 1) * costs.by_count[0][1]
    assert costs.total(counts) <= 0.7 * costs.whole < costs.total(counts) + one_more
    assert made.options["budget"] == {
        "written": "70%", "unit": "bytes", "most": pytest.approx(0.7 * costs.whole), "spent": costs.total(counts),
        "whole": costs.whole,
    }  # fmt: skip
    assert made.options["keep"] is None
    assert ("search" in made.options) == (scope == "searched")
    if scope == "layer":
        assert counts[0] == counts[1]


def test_a_search_goes_on_within_groups_and_a_clamped_k(files, tmp_path):
    options = PlanOptions(0.5, scope="searched", clamp_top_k=True)
    made = plan(files, tmp_path, options, "deepseek_v3", trials=4)
    for layer in made.layers:
        assert layer.groups is not None
        first, second = layer.groups.survivors(layer.keep, 8)
        assert first == second
    assert sum(len(layer.keep) for layer in made.layers) == 8
    plan(files, tmp_path / "one", PlanOptions(1, scope="searched", clamp_top_k=True))


def test_a_budget_of_milliseconds_is_spent_on_what_was_measured(uneven, files, tmp_path):
    def measure(plans):
        return {count: 1 + count / 4 for count in plans}

    at_most = AtMost.parse("2ms", "ms")
    options = PlanOptions(1.0, scope="searched")
    made = plan(files, tmp_path, options, uneven.name, at_most=at_most, measure=measure)
    assert [len(layer.keep) for layer in made.layers] == [2, 6]
    assert made.options["budget"]["spent"] == pytest.approx(2)


def test_plans_with_mean_outputs_are_timed_without(files, tmp_path):
    routers: set[str] = set()

    def measure(plans):
        routers.update(layer.router for layers in plans.values() for layer in layers)
        return {count: float(count) for count in plans}

    at_most = AtMost.parse("5ms", "ms")
    made = plan(files, tmp_path, PlanOptions(1.0, "mone"), at_most=at_most, measure=measure)
    assert (routers, {layer.router for layer in made.layers}) == ({"full"}, {"replace"})
    assert [len(layer.keep) for layer in made.layers] == [5, 5]
    assert made.means


def test_progress_counts_every_plan_that_is_tried(files, tmp_path):
    heard = Heard()
    plan_on_data(
        files / "mixtral", files / "data.npz", PlanOptions(4, scope="searched"), tmp_path / "plan.json",
        DataOptions(trials=3), on_progress=heard,
    )  # fmt: skip
    assert heard.counts("looking at the data") == [(6 * done, 30) for done in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("options", "how", "what", "hint"),
    [
        (
            PlanOptions(1.0),
            {"at_most": AtMost.parse("10KB", "bytes")},
            "--max-size 10KB cannot be reached: with 2 of 8 experts a layer, the fewest, it is 132,224 bytes",
            "the nearest that works: --max-size 132224B; or let K shrink: --clamp-top-k",
        ),
        (
            PlanOptions(1.0, scope="searched", floor=4),
            {"at_most": AtMost.parse("40%", "bytes")},
            "--max-size 40% cannot be reached: with 4 of 8 experts a layer, the fewest, it is 206,464 bytes",
            "the nearest that works: --max-size 206464B; or a lower --floor",
        ),
        (
            PlanOptions(1, scope="searched"),
            {},
            "--keep 1 leaves 2 experts for 2 layers, which need at least 4",
            "keep more: --keep 2; or let K shrink: --clamp-top-k",
        ),
        (
            PlanOptions(4, scope="searched", router="full"),
            {},
            "--router full cannot be searched for: what is tried has the rows of dropped experts gone",
            "give --router rows, or choose another --scope",
        ),
        (
            PlanOptions(4),
            {"at_most": AtMost.parse("50%", "bytes")},
            "--max-size is a budget of its own, spent at once",
            "leave out --max-size, or --keep, --rounds and --criterion naee",
        ),
        (
            PlanOptions(1.0),
            {"at_most": AtMost.parse("50%", "bytes"), "rounds": 2},
            "--max-size is a budget of its own, spent at once",
            "leave out --max-size, or --keep, --rounds and --criterion naee",
        ),
        (
            PlanOptions(4, "m-smoe", scope="searched"),
            {},
            "criterion 'm-smoe' merges experts, into a number that has to be given",
            "give --keep, with --scope layer or global",
        ),
        (PlanOptions(4, scope="searched"), {"trials": 0}, "--trials 0 is no number of plans to try", "give 1 or more"),
        (
            PlanOptions(4, scope="searched"),
            {"rounds": 2},
            ROUNDS_REFUSED.format("searched", "rows"),
            "every layer keeps as many, and the rows of dropped experts go: --scope layer --router rows",
        ),
        (
            PlanOptions(1.0, "mone"),
            {"at_most": AtMost.parse("50%", "bytes")},
            "--max-size is of a checkpoint, and none has a router that stays: replace",
            "give --router rows, or plan with --keep",
        ),
        (
            PlanOptions(1.0, scope="searched"),
            {"at_most": AtMost.parse("50%", "ms"), "measure": lambda plans: dict.fromkeys(plans, 3.14159)},
            "--max-latency 50% cannot be reached: with 2 of 8 experts a layer, the fewest, it is 3.142 ms",
            "the nearest that works: --max-latency 3.142ms; or let K shrink: --clamp-top-k",
        ),
        (
            PlanOptions(1.0),
            {"at_most": AtMost.parse("3ms", "ms")},
            "--max-latency needs something to measure with",
            "give plan_on_data a `measure`",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_any_data_is_read(options, how, what, hint, files, tmp_path):
    with pytest.raises(UserError) as caught:
        plan_on_data(files / "mixtral", tmp_path / "nothing.npz", options, tmp_path / "plan.json", DataOptions(**how))
    assert (caught.value.what, caught.value.hint) == (what, hint)


def test_a_model_that_says_nothing_is_not_searched_for(files, tmp_path):
    headless: Any = TINY["mixtral"]().base_model
    save_model(headless, tmp_path / "headless")
    with pytest.raises(UserError) as caught:
        plan_on_data(
            tmp_path / "headless", tmp_path / "nothing.npz", PlanOptions(4, scope="searched"), tmp_path / "plan.json"
        )
    assert caught.value.what == "MixtralModel has no head that gives logits"


def test_a_model_whose_experts_choose_is_refused_before_any_data_is_read(tmp_path):
    save_model(vmoe_expert_choice(), tmp_path / "checkpoint")
    with pytest.raises(UserError, match="experts choose their tokens"):
        plan_on_data(tmp_path / "checkpoint", tmp_path / "nothing.npz", PlanOptions(4), tmp_path / "plan.json")
