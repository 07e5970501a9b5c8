"""The commands that the page prints: their options are the command line's, and say what was asked for."""

import dataclasses
import importlib
import inspect
from typing import Any

import pytest

from moe_spec.plan import MILLISECONDS, PruningPlan
from pruning.budget.limit import FLAGS
from pruning.by_hand import parse_experts, plan_by_hand
from pruning.finetuning.flags import flag
from pruning.layers import LayerShape, ModelLayers
from pruning.options import PlanOptions
from report.artifacts import Found
from report.commands import BUDGETS, DEFAULTS, PLANNED, commands
from tests.report.made_up import model, plan, run

LAYERS = ModelLayers("checkpoint", (LayerShape("a", 4, 2, None), LayerShape("b", 4, 2, None)))


def options_of(verb):
    function = getattr(importlib.import_module(f"cli.{verb}"), verb)
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("verb", DEFAULTS)
def test_options_that_are_left_out_have_the_defaults_of_the_command_line(verb):
    known = options_of(verb)
    assert {name: known[name] for name in DEFAULTS[verb]} == DEFAULTS[verb]


def test_what_a_plan_records_of_its_options_are_options_of_plan():
    known = options_of("plan")
    assert {*PLANNED, *BUDGETS.values()} <= known.keys()
    assert {name for name in PlanOptions(4).recorded() if name in known} <= {*PLANNED}
    assert {unit: flag(option) for unit, option in BUDGETS.items()} == FLAGS


def lines_of(*plans):
    found = run(plans=tuple(Found(f"{index}.json", str(index), one) for index, one in enumerate(plans)))
    return [step.command for step in commands(found)]


@pytest.mark.parametrize(
    ("experts", "how", "said"),
    [
        (["0,2"], {}, "--experts a=0,2 --experts b=0,2 --router rows"),
        (["b=1"], {"clamp_top_k": True}, "--experts b=1 --clamp-top-k --router rows"),
        (["a=0,3"], {"router": "full"}, "--experts a=0,3 --router full"),
        (["0,1,2,3"], {}, "--experts a=0,1,2,3 --experts b=0,1,2,3 --router rows"),
    ],
)
def test_what_was_named_by_hand_is_named_again(experts, how, said):
    made = plan_by_hand(LAYERS, parse_experts(experts), **how)
    assert lines_of(made) == [f"moe-edge plan CHECKPOINT {said} -o 0.json"]


def test_a_budget_of_time_is_said_as_one():
    budget = {"written": "3ms", "unit": MILLISECONDS, "most": 3.0, "spent": 2.0, "whole": 4.0}
    asked = {"keep": None, "rounds": 1, "batch_size": 8, "limit": 50, "budget": budget, "exact": [True]}
    made = PruningPlan("checkpoint", "reap", plan().layers, {**asked, "data_sha256": "data"})
    said = "--criterion reap --data DATA.npz --batch-size 8 --limit 50 --max-latency 3ms"
    assert lines_of(made) == [f"moe-edge plan CHECKPOINT {said} -o 0.json"]


def test_an_export_is_asked_for_as_it_was():
    asked: dict[str, Any] = {
        "opset": 20,
        "dtype": "float16",
        "task": "feature-extraction",
        "cache": False,
        "external_data": 0,
    }
    whole = model("exported", kind="exported", own_code={"modeling.py": ""}, **asked)
    options = "--task feature-extraction --external-data 0 --dtype fp16 --trust-remote-code --no-cache"
    assert [step.command for step in commands(run(whole))] == [f"moe-edge export CHECKPOINT {options} -o exported"]


def test_a_plan_for_another_file_of_the_model_is_taken_where_that_is_said():
    foreign = model("optimized", "file", source="file", keep=2)
    other = Found("optimized", "optimized", dataclasses.replace(foreign.value, plan=plan()))
    (line,) = [step.command for step in commands(run(other)) if step.verb == "optimize"]
    assert line == "moe-edge optimize MODEL --plan plan.json --any-model -o optimized"
    (line,) = [step.command for step in commands(run(foreign)) if step.verb == "optimize"]
    assert line == "moe-edge optimize MODEL --plan plan.json -o optimized"
