import sys

import numpy as np
import pytest
import torch

from benchmarks.methods import __main__ as document
from benchmarks.methods import cells, recovery
from benchmarks.methods.cells import cell
from benchmarks.methods.choices import CHOICES, plan_of, tuned
from benchmarks.methods.recovery import learn, recipe_of
from benchmarks.methods.rows import RANDOM_DRAWS, RECOVERED, UNPRUNED, UNTRAINED
from benchmarks.methods.subject import Subject
from benchmarks.tasks.metrics import PERPLEXITY
from benchmarks.tasks.task import Task
from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from pruning.apply import apply_plan
from pruning.finetuning.options import Plain
from tests.models_table import EXPERTS, TINY

IN_THEIR_OWN_WAY = [name for name in RECOVERED if name not in UNTRAINED]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A tiny model, not trained; what is made for it lies in a cache of its own."""
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(recovery.RECIPES, "tiny", {"steps": 10, "batch_size": 2, "learning_rate": 0.01})
    save_model(TINY["mixtral"](), tmp_path / "checkpoint")
    for index, name in enumerate(("calibration", "test")):
        ids = np.random.default_rng(index).integers(0, 128, (8, 6))
        np.savez_compressed(tmp_path / f"{name}.npz", input_ids=ids)
    data = {name: tmp_path / f"{name}.npz" for name in ("calibration", "test")}
    return Task("tiny", tmp_path / "checkpoint", finetune=data["calibration"], metric=PERPLEXITY, **data)


@pytest.fixture
def subject(task):
    return Subject(task, seed=1)


@pytest.fixture
def trained(monkeypatch):
    """Every recipe that something is trained by."""
    seen = []

    def spy(model, subject, method, how):
        seen.append(how)
        learn(model, subject, method, how)

    monkeypatch.setattr(cells, "learn", spy)
    return seen


@pytest.fixture
def left(monkeypatch):
    """Every model that is to be judged."""
    models = []

    def evaluate(_task, model):
        models.append(model)
        return 0.0

    monkeypatch.setattr(Task, "evaluate", evaluate)
    return models


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_prunes(choice, subject):
    values = [UNTRAINED[choice](subject, keep) for keep in (0.5, 1)]
    assert (values[1] is None) == (choice == "naee")  # which keeps K experts at least
    assert all(value is None or np.isfinite(value) for value in values)


@pytest.mark.parametrize(
    "name", [UNPRUNED, "reap", "uncurl, new router", "router-norm, full router", *IN_THEIR_OWN_WAY]
)
def test_what_is_trained_is_trained_alike(name, subject, trained):
    value = RECOVERED[name](subject, 0.5)
    assert value is not None
    assert np.isfinite(value)
    assert value != cell(subject, None)
    assert trained == [recipe_of(subject)]


def test_routers_of_one_expert_each_learn_from_nobody(subject):
    assert RECOVERED["reap, router-kd"](subject, 1) is None
    assert RECOVERED["reap, router-kd"](subject, 1) is None  # nor are they asked again


def test_equal_plans_are_measured_once_whoever_made_them(subject, trained, monkeypatch):
    plans = [plan_of(subject, choice, 0.5, 0) for choice in ("frequency", "seer-actual")]
    assert None not in plans
    assert plans[0] != plans[1]
    values = [cell(subject, plan, Plain()) for plan in plans]
    assert values[0] == values[1]
    assert len(trained) == 1
    monkeypatch.setattr(cells, "measure", lambda *_: pytest.fail("measured again"))
    assert cell(subject, plans[0], Plain()) == values[0]


def test_what_differs_is_measured_by_itself(task, trained):
    subject, other = Subject(task, 0), Subject(task, 1)
    plan = plan_of(subject, "reap", 0.5, 0)
    assert cell(subject, plan) == cell(other, plan)  # the same model, and nothing is drawn
    assert cell(subject, plan, Plain()) != cell(other, plan, Plain())  # in another order
    drawn = [plan_of(subject, "uncurl, new router", 0.5, seed) for seed in (0, 1)]
    assert cell(subject, drawn[0]) != cell(subject, drawn[1])
    assert [how.seed for how in trained] == [0, 1]


def test_router_norm_compares_with_the_model_and_prunes_it(subject):
    plan = CHOICES["router-norm"](subject, 0.5, 0)
    before, after = (
        [torch.linalg.vector_norm(layer.router.get_parameter("weight"), dim=1) for layer in find_moe_layers(model)]
        for model in map(load_model, (subject.task.checkpoint, tuned(subject)))
    )
    for layer, old_E, new_E in zip(plan.layers, before, after, strict=True):
        assert layer.keep == tuple((new_E - old_E).topk(EXPERTS // 2).indices.sort().values.tolist())


@pytest.mark.parametrize("choice", ["router-norm, full router", "mone, mean outputs"])
def test_experts_that_are_left_behind_a_router_that_stays_learn(choice, subject, left):
    plan = CHOICES[choice](subject, 0.5, 0)
    cell(subject, plan, Plain())
    whole = load_model(subject.task.checkpoint)
    for layer, before, planned in zip(find_moe_layers(left[0]), find_moe_layers(whole), plan.layers, strict=True):
        for parameter, then in zip(layer.experts.parameters(), before.experts.parameters(), strict=True):
            assert (parameter != then[list(planned.keep)]).any()


def test_rows_that_share_an_expert_share_it_after_recovery(subject, left):
    plan = CHOICES["m-smoe, shared"](subject, 0.5, 0)
    cell(subject, plan, Plain())
    before = load_model(subject.task.checkpoint)
    apply_plan(before, plan)
    for layer, other, planned in zip(find_moe_layers(left[0]), find_moe_layers(before), plan.layers, strict=True):
        for parameter, then in zip(layer.experts.parameters(), other.experts.parameters(), strict=True):
            assert torch.equal(parameter, parameter[list(planned.survivor_of)])
            assert (parameter != then).flatten(1).any(dim=1).all()


def test_of_random_experts_several_are_drawn(subject):
    plans = [plan_of(subject, "random", 0.5, RANDOM_DRAWS * subject.seed + draw) for draw in range(RANDOM_DRAWS)]
    assert UNTRAINED["random"](subject, 0.5) == pytest.approx(np.mean([cell(subject, plan) for plan in plans]))


def test_the_document_has_a_row_a_method_and_a_column_a_share(task, monkeypatch, capsys):
    monkeypatch.setattr(document, "TASKS", {"tiny": lambda _seed, _tell: task})
    monkeypatch.setattr(document, "SHARES", {"50 %": 0.5, "all but one": 1})
    arguments = ["methods", "--seeds", "2", "--method", "naee", "--method", "task-specific"]
    monkeypatch.setattr(sys, "argv", arguments)
    document.main()
    text, progress = capsys.readouterr()
    lines = text.splitlines()
    rows = {line.split(" | ")[0]: line for line in lines if line.startswith("| ")}
    assert f"| not trained | {' | '.join(document.SHARES)} |" in lines
    assert f"| recovered | {' | '.join(document.SHARES)} |" in lines
    assert f"| {UNPRUNED} | {cell(Subject(task, 0), None):.1f} (" in text
    assert rows["| naee"].endswith(" | - |")
    assert "| task-specific" in rows
    assert "| reap" not in rows
    assert "Perplexity, lower is better; 2 seed(s), 1 trained model(s).\nRecovery: 10 steps of 2 examples" in text
    assert "`python -m benchmarks.methods --seeds 2 --method 'naee' --method 'task-specific'` printed this" in text
    assert "tiny, recovered: naee" in progress
