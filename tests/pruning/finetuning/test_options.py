"""Options that cannot be, refused when they are given."""

import pytest

from moe_spec.errors import UserError
from pruning.finetuning.options import METHODS, Plain, TaskSpecific, method, name_of
from pruning.finetuning.recipe import RECIPES, Recipe, recipe


@pytest.mark.parametrize(
    ("name", "options", "what", "hint"),
    [
        (
            "taskspecific",
            {},
            "'taskspecific' is no method",
            "did you mean 'task-specific'? known: full-router, plain, router-kd, seer, task-specific",
        ),
        ("plain", {"beta": 0.5}, "--beta is no option of --method plain", "its options are: none"),
        (
            "seer",
            {"temperature": 2.0},
            "--temperature is no option of --method seer",
            "its options are: --entropy-weight, --top-k, --lower-at",
        ),
        ("router-kd", {}, "--method router-kd needs --teacher", "--teacher CHECKPOINT"),
        ("full-router", {}, "--method full-router needs --plan", "--plan plan.json"),
        ("router-kd", {"teacher": "x", "temperature": 0.0}, "--temperature 0.0 is out of range, expected above 0", ""),
        ("task-specific", {"score": "beta"}, "'beta' is no score", "known: alpha, hit-rate"),
        ("task-specific", {"variant": "lazy"}, "'lazy' is no variant", "known: eager, staged, two-pass"),
        ("task-specific", {"windows": 0}, "--windows 0 is out of range, expected at least 1", ""),
        ("task-specific", {"beta": 0.0}, "--beta 0.0 is out of range, expected above 0 and at most 1", ""),
        ("task-specific", {"beta": 1.1}, "--beta 1.1 is out of range, expected above 0 and at most 1", ""),
        ("task-specific", {"beta": float("nan")}, "--beta nan is out of range, expected above 0 and at most 1", ""),
        ("task-specific", {"floor": 0}, "--floor 0 is out of range, expected at least 1", ""),
        ("seer", {"entropy_weight": -1.0}, "--entropy-weight -1.0 is out of range, expected 0 or more", ""),
        ("seer", {"top_k": 0}, "--top-k 0 is out of range, expected at least 1", ""),
    ],
)
def test_what_cannot_be_is_refused(name, options, what, hint):
    with pytest.raises(UserError) as caught:
        method(name, options)
    assert caught.value.what == what
    assert caught.value.hint == (hint or f"give {what.split('expected ')[1]}")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"steps": 0}, "--steps 0 is out of range, expected at least 1"),
        ({"batch_size": 0}, "--batch-size 0 is out of range, expected at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0 is out of range, expected above 0"),
        ({"warmup": 1.5}, "--warmup 1.5 is out of range, expected a share from 0 to 1"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0 is out of range, expected above 0 and finite"),
        ({"max_grad_norm": float("inf")}, "--max-grad-norm inf is out of range, expected above 0 and finite"),
        ({"weight_decay": float("nan")}, "--weight-decay nan is out of range, expected 0 or more"),
        ({"final_learning_rate": -1.0}, "--final-learning-rate -1.0 is out of range, expected 0 or more"),
        ({"momentum": 0.9}, "--momentum 0.9 is out of range, expected 0, for adamw takes none"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "--momentum 1.0 is out of range, expected from 0, below 1"),
        ({"optimizer": "lion"}, "'lion' is no optimizer"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes, what):
    good = {
        "optimizer": "adamw",
        "steps": 1,
        "learning_rate": 1.0,
        "final_learning_rate": 0.0,
        "warmup": 0.0,
        "batch_size": 1,
    }
    with pytest.raises(UserError) as caught:
        Recipe(**{**good, "max_grad_norm": 1.0, **changes})
    assert caught.value.what == what


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError) as caught:
        recipe("adam")
    assert (caught.value.what, caught.value.hint) == (
        "'adam' is no recipe",
        "did you mean 'adamw'? known: adamw, router-norm-cifar, router-norm-imagenet",
    )


def test_every_name_leads_to_its_method_and_back():
    needed = {"router-kd": {"teacher": "x"}, "full-router": {"plan": "x"}}
    for name, kind in METHODS.items():
        assert name_of(method(name, needed.get(name, {}))) == name
        assert METHODS[name] is kind
    assert method("plain", {}) == Plain()
    assert method("task-specific", {"beta": 0.1}) == TaskSpecific(beta=0.1)


@pytest.mark.parametrize(
    ("name", "peak", "warmup_steps", "batch_size"),
    [("router-norm-cifar", 0.0015, 100, 512), ("router-norm-imagenet", 9.375e-5, 500, 32)],
)
def test_the_recipes_of_the_pruned_vmoe(name, peak, warmup_steps, batch_size):
    sgd = RECIPES[name]
    assert (sgd.optimizer, sgd.momentum, sgd.max_grad_norm, sgd.weight_decay) == ("sgd", 0.9, 10, 0)
    assert (sgd.learning_rate, sgd.final_learning_rate, sgd.batch_size) == (peak, 1e-5, batch_size)
    assert (sgd.steps, round(sgd.warmup * sgd.steps)) == (1000, warmup_steps)
