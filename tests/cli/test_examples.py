"""What help gives as examples works: all of it, one verb after the other, in one directory, as a reader would."""

import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cli.help_page import EXAMPLE
from cli.main import VERBS
from models.checkpoints import save_model
from models.vmoe.assets import fashion_mnist
from tests.cli.helpers import done, invoke
from tests.cli.test_help import COMMAND
from tests.models.dense import llama

EXAMPLES = {
    verb: [line.removeprefix(EXAMPLE) for line in COMMAND.commands[verb].help.splitlines() if line.startswith(EXAMPLE)]
    for verb in VERBS
}
ELSEWHERE = {
    "demo": "test_demo.py",
    "torchrun": "../pruning/test_distributed.py",
    "doctor": "test_doctor.py",
    "exported-pruned/": "test_export.py",
    "--also": "test_build.py",
    "--against": "test_bench_against.py",
}
"""Where what an example with such a word does is tested, because it takes longer."""

LESS = {"finetune": ("--steps", 10), "bench": ("--repeats", 1, "--warmup", 0)}
"""What is added, so that it takes seconds: of options that are given twice the last one counts."""


@pytest.fixture(scope="module")
def here(tmp_path_factory, zoo):
    """A checkpoint, dense ones, a decoder, 40 examples of data and pictures: what the examples take as given."""
    directory = tmp_path_factory.mktemp("examples")
    (directory / "checkpoint").symlink_to(fashion_mnist())
    (directory / "decoder").symlink_to(zoo.cached("mixtral"))
    for name, data in (("train", "calibration"), ("test", "test")):
        with np.load(fashion_mnist() / f"{data}.npz") as arrays:
            np.savez(directory / f"{name}.npz", **{key: values[:40] for key, values in arrays.items()})
            pictures = arrays["images"][:2]
    for day, start in (("monday", 0), ("tuesday", 8)):
        with np.load(directory / "train.npz") as arrays:
            np.savez(directory / f"{day}.npz", images=arrays["images"][start : start + 8])
        done(
            "calibrate",
            directory / "checkpoint",
            "--data",
            directory / f"{day}.npz",
            "-o",
            directory / f"{day}.safetensors",
        )
    save_model(llama(), directory / "base")
    for name in ("novels", "speeches", "code"):
        (directory / name).symlink_to("base")
    (directory / "photographs").mkdir()
    for name, picture in zip(("boot.png", "photographs/bag.png"), pictures, strict=True):
        PIL.Image.fromarray(picture).save(directory / name)
    return directory


def run(line):
    """Exit code and stderr of ``line``."""
    command, verb, *words = shlex.split(line)
    assert command == "moe-edge"
    code, _, err = invoke(verb, *words, *LESS.get(verb, ()))
    return code, err


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_a_few_examples_that_it_understands(verb):
    assert 2 <= len(EXAMPLES[verb]) <= 4 or verb == "merge"
    for line in EXAMPLES[verb]:
        _, words = line.split(f"moe-edge {verb}")
        assert COMMAND.commands[verb].make_context(verb, shlex.split(words)).params


def test_what_is_not_run_here_is_run_elsewhere():
    assert [name for name in ELSEWHERE.values() if not (Path(__file__).parent / name).is_file()] == []


def test_every_example_works(here, monkeypatch):
    """One that needs what another makes waits for it."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(here)
    waiting = [line for verb in VERBS for line in EXAMPLES[verb] if not set(ELSEWHERE) & set(line.split())]
    while waiting:
        said = {line: run(line) for line in waiting}
        failed = {line: (code, err) for line, (code, err) in said.items() if (code, err) != (0, "")}
        for line, (code, err) in failed.items():
            assert len(failed) < len(waiting), f"{line} ends with {code}: {err}"
            assert " does not exist, expected " in err, f"{line} ends with {code}: {err}"
        waiting = list(failed)
