"""The rules at their edges, and every claim's measurement on tiny models that know nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.claims import CLAIMS, __main__, lab, one_expert, router_norm, seer, subjects, uncurl
from benchmarks.claims.claim import Finding, Outcome, Scores
from benchmarks.claims.flops import Flops, count_flops
from benchmarks.claims.lab import Training, only_routers, score, tuned
from benchmarks.layer import Layer, save_onnx
from benchmarks.tasks import images
from benchmarks.tasks.metrics import ACCURACY, PERPLEXITY
from benchmarks.tasks.task import Task
from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers, set_top_k
from moe_spec.layer_plan import FULL, LayerPlan
from moe_spec.plan import PruningPlan
from pruning.finetuning.options import Plain, Seer, TaskSpecific
from pruning.finetuning.recipe import recipe
from tests.models_table import EXPERTS, HIDDEN, TINY, TOP_K, VOCABULARY, WIDTH

SHORT = dataclasses.replace(recipe("router-norm-cifar"), steps=10, batch_size=4, learning_rate=0.1)
ADAMW = dataclasses.replace(recipe("adamw"), steps=2, batch_size=4, learning_rate=0.01)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))


def make_task(directory, name, arrays, metric):
    save_model(TINY[name](), directory / name)
    files = {}
    for index, split in enumerate(("calibration", "finetune", "test")):
        files[split] = directory / f"{name}-{split}.npz"
        np.savez_compressed(files[split], **arrays(np.random.default_rng(index)))
    return Task(name, directory / name, metric=metric, **files)


@pytest.fixture
def pictures(tmp_path):
    """Random images, as the model takes them, and labels."""
    return make_task(
        tmp_path,
        "vmoe",
        lambda random: {
            "pixel_values": random.standard_normal((8, 1, 12, 12)).astype(np.float32),
            "labels": random.integers(0, 10, 8),
        },
        ACCURACY,
    )


@pytest.fixture
def text(tmp_path):
    """Random tokens."""
    return make_task(
        tmp_path, "mixtral", lambda random: {"input_ids": random.integers(0, VOCABULARY, (8, 6))}, PERPLEXITY
    )


def accuracy(value):
    return Scores(ACCURACY, [value])


def perplexity(value):
    return Scores(PERPLEXITY, [value])


def silent_plan(model, keep):
    layers = (LayerPlan(layer.name, EXPERTS, TOP_K, keep, router=FULL) for layer in find_moe_layers(model))
    return PruningPlan("", "by hand", tuple(layers))


# what the claims are judged by


def norm_tables(ours=0.9, importance=0.89, at_75=0.8, tuned_at_50=0.93, unpruned=0.94):
    ways = {router_norm.OURS: ours, "importance": importance, "random": 0.6}
    before = {way: {"50 %": accuracy(value), "75 %": accuracy(value)} for way, value in ways.items()}
    before[router_norm.OURS]["75 %"] = accuracy(at_75)
    before["importance"]["75 %"] = accuracy(0.7)
    after = {
        router_norm.OURS: {"50 %": accuracy(tuned_at_50), "75 %": accuracy(0.5)},
        router_norm.UNPRUNED: {share: accuracy(unpruned) for share in router_norm.SHARES},
    }
    return before, after


@pytest.mark.parametrize(
    ("change", "reproduced"),
    [
        ({}, True),  # exactly 1 point lost at 50 %
        ({"tuned_at_50": 0.929}, False),
        ({"importance": 0.9}, False),  # no better than the control
        ({"at_75": 0.65}, False),  # better at 50 % only
    ],
)
def test_router_norms_have_to_beat_both_controls_and_to_recover(change, reproduced):
    finding = router_norm.judge(*norm_tables(**change))
    assert finding.reproduced == reproduced
    if not change:
        assert finding.ours == (
            "50 % dropped 90.0% (importance 89.0%, random 60.0%), fine-tuned 1.0 points below the unpruned; "
            "75 % dropped 80.0% (importance 70.0%, random 60.0%), fine-tuned 44.0 points below the unpruned"
        )


@pytest.mark.parametrize(
    ("dense", "times", "reproduced"),
    [(0.993, (2.0, 2.0), True), (0.9929, (3.0, 3.0), False), (1.0, (1.99, 3.0), False), (1.0, (3.0, 1.99), False)],
)
def test_one_expert_has_to_keep_accuracy_and_be_twice_as_fast_at_every_batch_size(dense, times, reproduced):
    finding = one_expert.judge(accuracy(1.0), accuracy(dense), dict(zip(one_expert.BATCHES, times, strict=True)))
    assert finding.reproduced == reproduced
    if reproduced:
        kept = "99.3% kept (99.3% of 100.0%)"
        assert finding.ours == f"{kept}, 2.00 times as fast at batch 1 and 2.00 times as fast at batch 64"


@pytest.mark.parametrize(
    ("merged", "dropped", "safe", "reproduced"),
    [
        ((40, 40, 40), (41, 41, 41), [2, 4, 8], True),  # as good as from scratch is safe
        ((40, 40, 40.1), (41, 41, 40), [2, 4], True),  # dropping wins where merging is not safe
        ((40, 40, 40), (41, 40, 41), [2, 4, 8], False),  # dropping is as good where it is
        ((40.1, 39, 39), (41, 41, 41), [], False),  # factors after the first that is not safe do not count
    ],
)
def test_merging_has_to_be_safe_and_better_than_dropping(merged, dropped, safe, reproduced):
    columns = {"uncurl": merged, "frequency": dropped, "from scratch": (40, 40, 40)}
    scores = {way: [perplexity(value) for value in values] for way, values in columns.items()}
    assert uncurl.safe_factors(scores) == safe
    finding = uncurl.judge(scores)
    assert finding.reproduced == reproduced
    limit = f"safe up to factor {safe[-1]}" if safe else "safe at no factor"
    assert finding.ours.startswith(
        f"{limit}; factor 2: {merged[0]:.1f} (from scratch 40.0, frequency {dropped[0]:.1f})"
    )


@pytest.mark.parametrize(
    ("ours", "unpruned", "flops", "reproduced"),
    [
        (accuracy(0.92), accuracy(0.93), 75, True),
        (accuracy(0.919), accuracy(0.93), 75, False),
        (accuracy(0.92), accuracy(0.93), 76, False),
        (perplexity(42.0), perplexity(40.0), 75, True),
        (perplexity(42.1), perplexity(40.0), 75, False),
    ],
)
def test_seer_has_to_lose_little_and_save_a_quarter(ours, unpruned, flops, reproduced):
    work = {seer.UNPRUNED: Flops(100, 50), seer.BOTH: Flops(flops, 25)}
    finding = seer.judge({seer.UNPRUNED: unpruned, seer.BOTH: ours}, work)
    assert finding.reproduced == reproduced


def test_what_is_better_is_worse_by_less_than_nothing():
    assert accuracy(0.95).loss(accuracy(0.94)) == "-1.0 points"
    assert perplexity(30.0).loss(perplexity(40.0)) == "-25.0 %"
    assert str(Scores(ACCURACY, [0.5, 0.7])) == "60.0% (50.0% to 70.0%)"


@pytest.mark.parametrize(
    ("held", "verdict"), [((True, True), "yes"), ((False, False), "no"), ((True, False), "on a, not on b")]
)
def test_the_verdict_names_tasks_where_they_differ(held, verdict):
    findings = {task: Finding(f"{task}!", one) for task, one in zip("ab", held, strict=True)}
    assert Outcome(findings, "").verdict == verdict
    assert Outcome(findings, "").ours == "a: a!; b: b!"


# how they are measured


def test_flops_are_those_of_the_products_done_by_hand():
    model, tokens, layers = TINY["mixtral"](), 6, 2
    ids = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}
    experts = 2 * layers * tokens * TOP_K * 3 * HIDDEN * WIDTH
    projections = 2 * layers * tokens * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2)  # half as many keys as queries
    pairs = 2 * layers * 2 * tokens * tokens * HIDDEN
    rest = 2 * tokens * HIDDEN * (layers * EXPERTS + VOCABULARY)
    found = count_flops(model, ids)
    assert found == Flops(experts + projections + pairs + rest, experts)
    for layer in find_moe_layers(model):
        set_top_k(model, layer, 1)
    assert count_flops(model, ids) == Flops(found.total - experts // 2, experts // 2)
    assert Flops(75, 0).fewer_than(Flops(100, 0)) == 0.25


def test_a_score_is_taken_once_for_every_plan_and_training(text, monkeypatch):
    plan = silent_plan(load_model(text.checkpoint), (0, 1))
    trainings = (None, Training(ADAMW), Training(ADAMW, Seer(top_k=1)), Training(ADAMW, routers_first=1))
    scores = [score(text, plan, training) for training in trainings]
    assert len(set(scores)) == len(scores)
    monkeypatch.setattr(lab, "load_model", lambda _: pytest.fail("measured again"))
    assert [score(text, plan, training) for training in trainings] == scores


def test_a_model_is_tuned_once(pictures, monkeypatch):
    dense = tuned(pictures, TaskSpecific(), SHORT)
    assert [layer.num_experts for layer in find_moe_layers(load_model(dense.checkpoint))] == [1, 1]
    assert tuned(pictures, Plain(), SHORT).checkpoint != dense.checkpoint
    monkeypatch.setattr(lab, "finetune", lambda *_: pytest.fail("trained again"))
    assert tuned(pictures, TaskSpecific(), SHORT) == dense


def test_routers_alone_learn_for_a_while(text):
    model = load_model(text.checkpoint)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with only_routers(model):
        Training(ADAMW).run(model, text)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"{layer.name}.gate.weight" for layer in find_moe_layers(model)}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_images_are_turned_with_their_labels(pictures, tmp_path, monkeypatch):
    for name in ("calibration", "finetune", "test"):
        np.savez(tmp_path / f"{name}.npz", images=np.arange(24, dtype=np.uint8).reshape(2, 3, 4), labels=[3, 5])
    files = {name: tmp_path / f"{name}.npz" for name in ("calibration", "finetune", "test")}
    monkeypatch.setattr(images, "task", lambda: dataclasses.replace(pictures, **files))
    with np.load(subjects.turned().test) as data:
        assert data["images"][0].tolist() == [[3, 7, 11], [2, 6, 10], [1, 5, 9], [0, 4, 8]]
        assert data["labels"].tolist() == [3, 5]


def test_models_are_timed_once(pictures, monkeypatch):
    def save(task, directory):
        directory.mkdir()
        save_onnx(Layer(experts=1, top_k=1), directory / "model.onnx")
        return directory / "model.onnx"

    monkeypatch.setattr(one_expert, "optimized", save)
    monkeypatch.setattr(one_expert, "REPEATS", 1)
    times = one_expert.speed_up(one_expert.Pair(pictures, pictures))
    assert list(times) == list(one_expert.BATCHES)
    assert min(times.values()) > 0
    monkeypatch.setattr(one_expert, "optimized", lambda *_: pytest.fail("timed again"))
    assert one_expert.speed_up(one_expert.Pair(pictures, pictures)) == times


# every claim, from models to the document


@pytest.fixture
def small_world(pictures, text, monkeypatch):
    for module in (router_norm, one_expert):
        monkeypatch.setattr(module, "turned", lambda: pictures)
        monkeypatch.setattr(module, "LEARN", SHORT)
    monkeypatch.setattr(router_norm, "RECOVER", dataclasses.replace(SHORT, steps=2))
    monkeypatch.setattr(one_expert, "speed_up", lambda _pair: {1: 1.5, 64: 2.5})
    monkeypatch.setattr(router_norm, "DRAWS", {"random": 2})
    monkeypatch.setattr(seer, "TASKS", {"code": lambda _seed, _report: text})
    monkeypatch.setattr(seer, "RECIPES", {"code": ADAMW})
    monkeypatch.setattr(uncurl, "FACTORS", (4, 8))
    monkeypatch.setattr(uncurl, "FINE_TUNING", Training(ADAMW))
    monkeypatch.setattr(uncurl, "ROUTERS_FIRST", 1)
    monkeypatch.setattr(uncurl, "small_language", lambda _experts, _seed, _report: text)


def test_the_document_has_a_line_a_claim_and_all_its_numbers(small_world):
    told: list[str] = []
    outcomes = {name: claim.measure(1, told.append) for name, claim in CLAIMS.items()}
    text = __main__.report(outcomes, 1, "command")
    lines = text.splitlines()
    summary = lines[lines.index("| paper | claimed | ours | reproduced |") + 2 :][: len(CLAIMS)]
    for line, (name, claim) in zip(summary, CLAIMS.items(), strict=True):
        assert line == f"| {claim.paper} | {claim.claimed} | {outcomes[name].ours} | {outcomes[name].verdict} |"
        assert f"## {name}" in lines
        assert __main__.wrapped(f"**Reproduced if** {claim.rule}.") in text
        assert outcomes[name].details in text
        assert f"**Reproduced: {outcomes[name].verdict}.**" in text
    assert {line.partition(":")[0] for line in told} == {"router norm", "one expert", "UNCURL", "SEER-MoE"}
    for way in (*router_norm.WAYS, *seer.WAYS, router_norm.UNPRUNED):
        assert f"| {way} | " in text
