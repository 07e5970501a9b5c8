"""A misspelt word is answered with the one that was meant: verbs, options, and every value that a table knows."""

import re

import numpy as np
import pytest

from cli.main import main
from tests.cli.helpers import invoke


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        (["exprot"], "no such command 'exprot'. Did you mean 'export'?", "moe-edge --help"),
        (
            ["plan", "--criterio", "reap"],
            "no such option: --criterio",
            "did you mean --criterion? moe-edge plan --help",
        ),
        (
            ["run", "--batch_size", "4"],
            "no such option: --batch_size",
            "did you mean --batch-size? moe-edge run --help",
        ),
        (
            ["targets", "--maxShape=x:1"],
            "no such option: --maxShape",
            "did you mean --maxShapes? moe-edge targets --help",
        ),
        (
            ["run", "x", "--threads", "-1"],
            "--threads is '-1', expected INT, 0 or more",
            "moe-edge run --help",
        ),
        (["prune", "x", "-o", "y"], "missing option '--plan'", "moe-edge prune --help"),
        (["inspect"], "missing argument 'PATH'", "moe-edge inspect --help"),
    ],
)
def test_a_word_that_the_command_line_does_not_know_is_a_usage_error(given, what, hint, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(given)
    assert (leaving.value.code, capsys.readouterr()) == (2, ("", f"error: {what}\nhint: {hint}\n"))


def test_no_verb_is_answered_with_the_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        main([])
    out, err = capsys.readouterr()
    assert (leaving.value.code, err) == (2, "")
    assert "Example: moe-edge demo" in out


PLAN = ("plan", "x", "-o", "new", "--keep", "4")
OPTIMIZE = ("optimize", "x", "-o", "new")
FINETUNE = ("finetune", "x", "-o", "new", "--data", "x.npz")
VERIFY = ("verify", "x", "--reference", "x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((*PLAN, "--criterion", "reep"), "'reep' is no criterion; 'reap'"),
        ((*PLAN, "--criterion", "hc-smo"), "'hc-smo' is no criterion; 'hc-smoe'"),
        ((*PLAN, "--scope", "globl"), "'globl' is no scope; 'global'"),
        ((*PLAN, "--router", "ful"), "'ful' is no router of a plan that drops experts; 'full'"),
        ((*PLAN, "--target", "edge-llm-fp61"), "unknown target 'edge-llm-fp61'; 'edge-llm-fp16'"),
        ((*OPTIMIZE, "--target", "rtx-adda"), "unknown target 'rtx-adda'; 'rtx-ada'"),
        ((*OPTIMIZE, "--form", "dens"), "unknown form 'dens'; 'dense'"),
        ((*OPTIMIZE, "--precision", "fp61"), "unknown precision 'fp61'; 'fp16'"),
        ((*OPTIMIZE, "--rest-precision", "bf61"), "unknown precision 'bf61'; 'bf16'"),
        (("export", "x", "-o", "new", "--dtype", "fp61"), "unknown precision 'fp61'; 'fp16'"),
        ((*VERIFY, "--precision", "w8"), "unknown precision 'w8'; 'w8a8'"),
        ((*VERIFY, "--provider", "cdua"), "'cdua' is no execution provider; 'cuda'"),
        (("run", "x", "--input", "x", "--provider", "opnvino"), "'opnvino' is no execution provider; 'openvino'"),
        (("bench", "x", "--against", "toch"), "'toch' is no way to run a checkpoint; 'torch'"),
        (("build", "x", "-o", "new", "--target", "jetson-orn"), "unknown target 'jetson-orn'; 'jetson-orin'"),
        (
            ("build", "x", "-o", "new", "--target", "sm80", "--backend", "tensor"),
            "unknown backend 'tensor'; 'tensorrt'",
        ),
        (("bundle", "x", "-o", "new", "--target", "jetson-orn"), "unknown target 'jetson-orn'; 'jetson-orin'"),
        (("targets", "--target", "h10"), "unknown target 'h10'; 'h100'"),
        (("families", "deepsek_v3"), "'deepsek_v3' is no family that moe-edge has looked at; 'deepseek_v3'"),
        ((*FINETUNE, "--method", "ser"), "'ser' is no method; 'seer'"),
        ((*FINETUNE, "--recipe", "adamv"), "'adamv' is no recipe; 'adamw'"),
        ((*FINETUNE, "--method", "task-specific", "--score", "alfa"), "'alfa' is no score; 'alpha'"),
        ((*FINETUNE, "--method", "task-specific", "--variant", "eger"), "'eger' is no variant; 'eager'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_value_that_no_table_has_names_the_closest(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what, meant = message.split("; ")
    code, out, err = invoke(*given)
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: {re.escape(what)}\nhint: did you mean {meant}\? known: .*\n", err)


def test_so_it_is_for_what_is_looked_up_once_a_model_is_there(zoo, tmp_path):
    """The tasks that a checkpoint has, and how accelerate spreads one."""
    checkpoint, data = zoo.checkpoint("mixtral"), tmp_path / "data.npz"
    np.savez(data, input_ids=np.array([[5, 7, 2]]))
    code, _, err = invoke("export", checkpoint, "-o", tmp_path / "new", "--task", "text-genration")
    assert (code, err.splitlines()[1].split(" known")[0]) == (1, "hint: did you mean 'text-generation'?")
    code, _, err = invoke("calibrate", checkpoint, "--data", data, "-o", tmp_path / "new", "--device-map", "atuo")
    assert (code, err.splitlines()[1].split(" known")[0]) == (1, "hint: did you mean 'auto'?")
