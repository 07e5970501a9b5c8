import dataclasses
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.identity import checkpoint_sha256
from moe_spec.plan import PruningPlan
from moe_spec.statistics import KEYS, LayerStatistics, Statistics
from pruning.options import PlanOptions
from pruning.plan import make_plan, plan
from tests.models_table import TINY


def statistics(tokens, gated_norm):
    sums = {key: np.zeros(4) for key, row in KEYS.items() if row.axes == "E"}
    sums |= {"tokens": np.asarray(tokens, np.float64), "gated_norm": np.asarray(gated_norm, np.float64)}
    return LayerStatistics("layers.0.mlp", 4, 2, 20, sums)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "statistics.safetensors"
    first = statistics(tokens=(9, 5, 5, 1), gated_norm=(9, 10, 1, 8))
    second = dataclasses.replace(statistics((1, 1, 1, 1), (1, 2, 3, 4)), name="layers.1.mlp")
    Statistics("model", ("data",), (first, second)).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "deepseek_v3"
    save_model(TINY["deepseek_v3"](), directory)
    return directory


def test_a_plan_says_what_it_was_made_from(source, tmp_path):
    made = plan(source, PlanOptions(keep=0.5), tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == made
    assert (made.model_sha256, made.statistics_sha256) == ("model", sha256_file(source))
    assert made.criterion == "reap"
    assert made.options == {
        "keep": 0.5,
        "scope": "layer",
        "seed": 0,
        "clamp_top_k": False,
        "router": "rows",
        "protect": False,
        "pretrained": None,
        "floor": 1,
        "target": None,
    }
    assert [layer.name for layer in made.layers] == ["layers.0.mlp", "layers.1.mlp"]


@pytest.mark.parametrize(
    ("criterion", "keep", "scores"),
    [("reap", (1, 3), (1.0, 2.0, 0.2, 8.0)), ("frequency", (0, 1), (9.0, 5.0, 5.0, 1.0))],
)
def test_the_criterion_decides_who_stays(source, criterion, keep, scores):
    layer = make_plan(source, PlanOptions(keep=2, criterion=criterion)).layers[0]
    assert (layer.keep, layer.scores) == (keep, scores)


def test_the_scope_decides_how_many_stay_where(source):
    counts = [len(layer.keep) for layer in make_plan(source, PlanOptions(keep=3, scope="global")).layers]
    assert counts == [2, 4]


def test_one_expert_a_layer_needs_the_clamp(source):
    made = make_plan(source, PlanOptions(keep=1, clamp_top_k=True))
    assert [(layer.keep, layer.top_k) for layer in made.layers] == [((3,), 1), ((3,), 1)]


def test_random_needs_only_a_checkpoint_and_repeats_with_its_seed(checkpoint):
    first, second, other = (
        make_plan(checkpoint, PlanOptions(keep=4, criterion="random", seed=seed)) for seed in (0, 0, 1)
    )
    assert first == second != other
    assert first.model_sha256 == checkpoint_sha256(checkpoint)
    assert first.statistics_sha256 is None
    for layer in first.layers:
        assert layer.groups is not None
        assert layer.groups.survivors(layer.keep, layer.experts) == [2, 2]


def test_random_takes_its_layers_from_statistics_too(source):
    made = make_plan(source, PlanOptions(keep=2, criterion="random"))
    assert (made.model_sha256, made.statistics_sha256) == ("model", None)
    assert [len(layer.keep) for layer in made.layers] == [2, 2]


def refusal(source, **options):
    with pytest.raises(UserError) as caught:
        make_plan(source, PlanOptions(**options))
    return caught.value.what, caught.value.hint


@pytest.mark.parametrize(("name", "without"), [("checkpoint", "aimer or random"), ("model.onnx", "random")])
def test_a_model_is_no_statistics(name, without, checkpoint):
    source = checkpoint if name == "checkpoint" else Path(name)
    what, hint = refusal(source, keep=4)
    assert what == f"criterion 'reap' ranks by statistics, but {source} is a model"
    assert hint == (
        f"moe-edge calibrate {source} --data DATA.npz -o statistics.safetensors, and plan with that; "
        f"without data: --criterion {without}, or --experts"
    )


def test_unknown_names_are_refused_with_the_nearest(source):
    what, hint = refusal(source, keep=2, criterion="freqency")
    assert what == "'freqency' is no criterion"
    assert hint.startswith("did you mean 'frequency'? known: aimer, ean, easy-ep, frequency, gate-mass, hc-smoe, ")
    assert hint.endswith("router-norm, s(b,alpha,beta), seer-actual, seer-soft, task, task-squared, uncurl")
    assert refusal(source, keep=2, scope="layers") == (
        "'layers' is no scope",
        "did you mean 'layer'? known: global, layer, searched",
    )


def test_a_member_of_the_family_ranks_like_the_criterion_that_it_is(source):
    by_name, by_powers = (make_plan(source, PlanOptions(keep=2, criterion=name)) for name in ("reap", "s(1,1,1)"))
    assert by_name.layers == by_powers.layers
    assert (by_name.criterion, by_powers.criterion) == ("reap", "s(1,1,1)")


def test_super_experts_stay_though_they_score_least(tmp_path):
    path = tmp_path / "statistics.safetensors"
    quiet = statistics(tokens=(9, 9, 9, 9), gated_norm=(9, 8, 7, 1))
    loud = dataclasses.replace(quiet, sums={**quiet.sums, "output_peak": np.array([0.0, 0, 0, 50])})
    layers = [dataclasses.replace(one, name=f"layers.{i}.mlp") for i, one in enumerate((loud, quiet))]
    Statistics("model", ("data",), tuple(layers)).save(path)
    assert [layer.keep for layer in make_plan(path, PlanOptions(keep=2)).layers] == [(0, 1), (0, 1)]
    made = make_plan(path, PlanOptions(keep=2, protect=True))
    assert [layer.keep for layer in made.layers] == [(0, 3), (0, 1)]
    assert made.layers[0].scores == (1.0, 8 / 9, 7 / 9, 1 / 9)


def test_protection_needs_statistics(checkpoint):
    assert refusal(checkpoint, keep=4, criterion="random", protect=True) == (
        "--protect finds super experts in statistics, but criterion 'random' takes none",
        "rank by statistics, or leave out --protect",
    )


def test_a_search_needs_data(source):
    assert refusal(source, keep=4, criterion="naee") == (
        "criterion 'naee' searches on data, and there is none",
        "moe-edge plan CHECKPOINT --data DATA.npz --criterion naee",
    )


def test_weights_are_ranked_without_statistics(checkpoint):
    made = make_plan(checkpoint, PlanOptions(keep=4, criterion="aimer"))
    assert (made.model_sha256, made.statistics_sha256) == (checkpoint_sha256(checkpoint), None)
    assert all(len(layer.keep) == 4 and -1 <= min(layer.scores) < max(layer.scores) < 0 for layer in made.layers)


def test_a_plan_holds_the_hash_of_the_checkpoint_before_fine_tuning(checkpoint, tmp_path):
    model = load_model(checkpoint)
    find_moe_layers(model)[0].router.get_parameter("weight").data[5] *= 2
    save_model(model, tmp_path / "finetuned")
    options = PlanOptions(keep=4, criterion="router-norm", pretrained=checkpoint)
    made = plan(tmp_path / "finetuned", options, tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == made
    assert made.options["pretrained"] == checkpoint_sha256(checkpoint)
    assert made.layers[0].scores[5] > 0
    assert [layer.keep for layer in made.layers] == [(0, 1, 4, 5), (0, 1, 4, 5)]


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (
            {"criterion": "aimer", "scope": "global"},
            "criterion 'aimer' ranks within a layer only",
            "plan with --scope layer",
        ),
        (
            {"criterion": "router-norm"},
            "criterion 'router-norm' compares a checkpoint with the one that it was fine-tuned from",
            "name that: --pretrained CHECKPOINT",
        ),
        (
            {"criterion": "random", "pretrained": Path("base")},
            "criterion 'random' compares with no other checkpoint",
            "leave out --pretrained; it is for --criterion router-norm",
        ),
    ],
)
def test_what_criteria_by_weights_cannot_do_is_refused_before_a_weight_is_read(options, what, hint, tmp_path):
    assert refusal(tmp_path / "nothing", keep=4, **options) == (what, hint)


def test_a_budget_that_cannot_be_is_refused_before_a_weight_is_read(checkpoint, tmp_path):
    what, _ = refusal(checkpoint, keep=9, criterion="router-norm", pretrained=tmp_path / "nothing")
    assert what == "--keep 9 asks for 9 experts, but layer model.layers.0.mlp has 8"


def test_statistics_hold_no_weights(source):
    assert refusal(source, keep=2, criterion="aimer")[0] == f"{source} is a file, expected a checkpoint directory"


def test_a_router_that_stays_keeps_fewer_than_k(source):
    made = make_plan(source, PlanOptions(keep=1, router="full"))
    assert [(layer.router, layer.top_k, len(layer.keep)) for layer in made.layers] == [("full", 2, 1)] * 2


@pytest.mark.parametrize("keep", [0, 1.5, -0.5])
def test_a_budget_that_is_none_is_refused_in_python_too(source, keep):
    assert refusal(source, keep=keep)[0] == f"--keep {keep} is neither a count of experts nor a share of them"


def test_statistics_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "statistics.safetensors"
    Statistics("model", ("data",), (statistics((1, 1, 1, 1), (1, np.inf, 1, 1)),)).save(path)
    expected = "the statistics of layer layers.0.mlp are not finite: the model overflowed on the calibration data"
    assert refusal(path, keep=2)[0] == expected


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    out = tmp_path / "plan.json"
    out.touch()
    with pytest.raises(UserError) as caught:
        plan(tmp_path / "nothing", PlanOptions(keep=2), out)
    assert caught.value.what == f"{out} already exists"
