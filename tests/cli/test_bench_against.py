"""The checkpoint in torch, timed beside its export."""

import json

import pytest

from cli.against import InTorch
from tests.cli.helpers import invoke


def test_the_checkpoint_takes_turns_with_its_export(zoo):
    export, checkpoint = zoo.exported("mixtral"), zoo.checkpoint("mixtral")
    arguments = (export, "--batch-size", 1, "--repeats", 2, "--against", "torch", "--checkpoint", checkpoint, "--json")
    code, out, err = invoke("bench", *arguments)
    report = json.loads(out)
    ours, theirs = report["rows"]
    assert (code, err, report["notes"]) == (0, "", [])
    assert (ours["model"], theirs["model"]) == (str(export), f"torch {checkpoint}")
    assert ours["tokens_per_second"] > 0 < theirs["tokens_per_second"]
    assert theirs["load_ms"] > 0
    assert theirs["memory_bytes"] is None or theirs["memory_bytes"] > 0
    assert theirs["file_bytes"] == (checkpoint / "model.safetensors").stat().st_size


def test_another_checkpoint_than_the_models_is_told(zoo):
    export, checkpoint = zoo.exported("mixtral"), zoo.checkpoint("qwen3_moe")
    assert list(InTorch("torch", checkpoint, export).notes()) == [
        f"{checkpoint} is not the checkpoint that {export} was made from"
    ]


def test_what_was_made_from_an_unknown_checkpoint_needs_it_named(zoo):
    export = zoo.exported("mixtral")
    assert invoke("bench", export, "--against", "torch") == (
        1,
        "",
        f"error: {export} knows the checkpoint that it was made from by its hash only\n"
        "hint: say where that is: --checkpoint DIRECTORY\n",
    )


def test_a_bare_file_does_not_say_how_a_checkpoint_is_called(zoo):
    file = zoo.exported("mixtral") / "model.onnx"
    assert invoke("bench", file, "--against", "torch", "--checkpoint", zoo.checkpoint("mixtral")) == (
        1,
        "",
        f"error: how a checkpoint is called like {file} is not known: it has no manifest.json\n"
        "hint: time a directory that export, optimize or build wrote\n",
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--checkpoint", "x"), 1, "error: --checkpoint is for --against\nhint: add --against torch\n"),
        (("--against", "jax"), 1, "'jax' is no way to run a checkpoint"),
    ],
)
def test_what_fits_nothing_is_refused(zoo, arguments, code, said):
    found, _, err = invoke("bench", zoo.exported("mixtral"), *arguments)
    assert (found, said in err) == (code, True)
