import json

import pytest

import pruning.finetuning.finetune
from moe_spec.identity import checkpoint_sha256
from tests.cli.helpers import invoke, leftovers
from tests.cli.interrupt import ctrl_c
from tests.pruning.finetuning.examples import saved

QUICK = ("--steps", 4, "--batch-size", 8, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return saved("vmoe", tmp_path_factory.mktemp("task"))


def run(task, out, *arguments):
    checkpoint, data = task
    return invoke("finetune", checkpoint, "--data", data, "-o", out, *arguments)


def test_finetune_writes_a_checkpoint_and_one_line(task, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = run(task, out, *QUICK)
    assert (code, stderr) == (0, "")
    losses = json.loads((out / "finetuning.json").read_text())["losses"]
    first, last = losses[0], losses[-1]
    assert stdout == f"{out}: 4 steps of plain, loss {first:.4f} in the first tenth, {last:.4f} in the last\n"


def test_json_names_the_new_model_and_what_was_done(task, tmp_path):
    out = tmp_path / "out"
    options = ("--method", "task-specific", "--windows", 2, "--beta", 0.9, "--seed", 7)
    code, stdout, stderr = run(task, out, *QUICK, *options, "--json")
    assert (code, stderr) == (0, "")
    result = json.loads(stdout)
    done = result["finetuning"]
    assert (result["output"], result["model_sha256"]) == (str(out), checkpoint_sha256(out))
    assert done["model_sha256"] == checkpoint_sha256(task[0])
    assert done["options"] == {"score": "alpha", "variant": "eager", "windows": 2, "beta": 0.9, "floor": 1}
    assert (done["recipe"]["optimizer"], done["recipe"]["seed"], done["recipe"]["steps"]) == ("adamw", 7, 4)
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "plan.json", "finetuning.json"}


def test_single_options_change_a_recipe(task, tmp_path):
    changes = ("--warmup", 0.25, "--momentum", 0.5, "--max-grad-norm", 2, "--final-learning-rate", 1e-6)
    arguments = ("--recipe", "router-norm-imagenet", "--steps", 4, *changes, "--json")
    code, stdout, stderr = run(task, tmp_path / "out", *arguments)
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["finetuning"]["recipe"] == {
        "optimizer": "sgd",
        "steps": 4,
        "learning_rate": 9.375e-5,
        "final_learning_rate": 1e-6,
        "warmup": 0.25,
        "batch_size": 32,
        "max_grad_norm": 2.0,
        "momentum": 0.5,
        "weight_decay": 0.0,
        "seed": 0,
    }


def test_seer_and_router_kd_take_their_options(task, tmp_path):
    code, _, stderr = run(task, tmp_path / "seer", *QUICK, "--method", "seer", "--top-k", 1, "--lower-at", 3)
    assert (code, stderr) == (0, "")
    assert json.loads((tmp_path / "seer" / "config.json").read_text())["num_experts_per_tok"] == 1
    code, _, stderr = run(task, tmp_path / "kd", *QUICK, "--method", "router-kd", "--teacher", task[0])
    assert (code, stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ("--method", "magic"),
            "error: 'magic' is no method\nhint: known: full-router, plain, router-kd, seer, task-specific\n",
        ),
        (
            ("--beta", 0.5),
            "error: --beta is no option of --method plain\nhint: its options are: none\n",
        ),
        (
            ("--method", "task-specific", "--beta", 2),
            "error: --beta 2.0 is out of range, expected above 0 and at most 1\nhint: give above 0 and at most 1\n",
        ),
        (
            ("--method", "task-specific", *QUICK),
            "error: the first half of 4 steps cannot be divided into 5 windows\n"
            "hint: give at least 10 steps: --steps 10; or fewer windows: --windows 1\n",
        ),
        (
            ("--method", "seer", "--top-k", 3),
            "error: --top-k 3 is more than the K=2 that the model has\nhint: give at most --top-k 2\n",
        ),
        (
            ("--momentum", 0.9),
            "error: --momentum 0.9 is out of range, expected 0, for adamw takes none\n"
            "hint: give 0, for adamw takes none\n",
        ),
        (
            ("--method", "router-kd"),
            "error: --method router-kd needs --teacher\nhint: --teacher CHECKPOINT\n",
        ),
    ],
)
def test_a_mistake_ends_in_an_error_and_a_hint(task, tmp_path, arguments, error):
    assert run(task, tmp_path / "out", *arguments) == (1, "", error)
    assert leftovers(tmp_path) == set()


def test_an_existing_output_is_refused(task, tmp_path):
    assert run(task, tmp_path) == (
        1,
        "",
        f"error: {tmp_path} already exists\nhint: give another -o, or remove it first: rm -r {tmp_path}\n",
    )


def test_ctrl_c_while_training_leaves_nothing(task, tmp_path):
    with ctrl_c(after=2.0):
        ended = run(task, tmp_path / "out", "--steps", 100_000, "--batch-size", 8)
    assert ended == (130, "", "interrupted; nothing half-written is left\n")
    assert leftovers(tmp_path) == set()


def test_ctrl_c_while_writing_leaves_nothing(task, tmp_path, monkeypatch):
    def half(model, directory):
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning.finetuning.finetune, "save_model", half)
    assert run(task, tmp_path / "out", *QUICK) == (130, "", "interrupted; nothing half-written is left\n")
    assert leftovers(tmp_path) == set()
