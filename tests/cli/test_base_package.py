"""The verbs of a device, in a Python that has the base package's dependencies and theirs, and nothing else."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from tests.graph_passes.block_models import save, spec_of
from tests.runtime import tiny

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ABSENT = {"torch", "transformers", "onnx", "onnx_graphsurgeon", "scipy", "ml_dtypes", "jinja2", "tokenizers"}
ALONE = ("text", "optimize", "prune", "export", "tensorrt-rtx")
"""Extras of which each is enough for what it is for."""
CODE = "import sys; from cli.main import main; sys.exit(main())"


def needed(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that an installer would bring for these, on this machine."""
    found: set[str] = set()
    waiting = [("", requirement) for requirement in requirements]
    while waiting:
        extra, text = waiting.pop()
        requirement = Requirement(text)
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        found.add(requirement.name)
        more = importlib.metadata.requires(requirement.name) or ()
        waiting += [(wanted, text) for wanted in ("", *requirement.extras) for text in more]
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Folders that hold the base package's dependencies, and those of it with ``text``."""

    def folder(name, requirements):
        path = tmp_path_factory.mktemp(name)
        for distribution in map(importlib.metadata.distribution, {"moe-edge", *needed(requirements)}):
            for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                if not (path / part).exists():
                    (path / part).symlink_to(Path(str(distribution.locate_file(part))))
        return path

    base, extras = PROJECT["dependencies"], PROJECT["optional-dependencies"]
    return {"base": folder("base", base)} | {name: folder(name, base + extras[name]) for name in ALONE}


@pytest.fixture
def moe_edge(packages):
    def run(installed, *arguments):
        command = [sys.executable, "-S", "-W", "error", "-c", CODE, *map(str, arguments)]
        environment = {"PYTHONPATH": f"{packages[installed]}:{ROOT}", "OMP_NUM_THREADS": "1"}
        found = subprocess.run(command, env=environment, cwd=packages[installed], capture_output=True, text=True)
        return found.returncode, found.stdout, found.stderr

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "a.npz", x=tiny.examples(3))
    return tmp_path / "a.npz"


def test_what_the_other_extras_bring_is_not_there(packages):
    base, text = ({part.name for part in packages[name].iterdir()} for name in ("base", "text"))
    assert {"numpy", "onnxruntime", "PIL", "rich", "safetensors", "typer"} <= base
    assert base & ABSENT == set()
    assert text & ABSENT == {"jinja2", "tokenizers"}


def test_the_base_package_runs_a_model(model, data, moe_edge, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"x": row.tolist()}) + "\n" for row in tiny.examples(3)))
    code, out, err = moe_edge("base", "run", model, "--input", data, "--input", tmp_path / "a.jsonl", "--json")
    assert (code, err) == (0, "")
    examples = json.loads(out)["examples"]
    assert len(examples) == 6
    assert [row["class"] for row in examples[:3]] == [row["class"] for row in examples[3:]]


def test_the_base_package_verifies_and_times_a_model(model, data, moe_edge):
    code, out, err = moe_edge("base", "verify", model, "--reference", model, "--data", data, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["passed"]
    code, out, err = moe_edge("base", "bench", model, "--repeats", 2, "--warmup", 1, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)


def test_a_decoder_writes_text_with_the_text_extra_alone(zoo, moe_edge):
    prompted = ("run", zoo.cached("mixtral"), "--prompt", "w5 w77 w9", "--max-new-tokens", 4)
    code, out, err = moe_edge("text", *prompted, "--chat")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"(w\d+ ){3}w\d+\n", out)
    code, out, err = moe_edge("base", *prompted)
    assert (code, out) == (1, "")
    assert "moe-edge[text]" in err


def test_the_doctor_needs_the_base_package_alone(moe_edge):
    code, out, err = moe_edge("base", "doctor", "--json")
    assert (code, err) == (0, "")
    health = json.loads(out)
    assert [found["name"] for found in health["extras"] if found["works"]] == []
    assert {found["name"]: found["works"] for found in health["providers"]}["cpu"]
    assert {found["hint"] for found in health["extras"]} >= {"pip install 'moe-edge[export]'"}


def test_an_extra_is_enough_to_optimize(moe_edge, tmp_path):
    save(spec_of("masked_loop", "softmax"), tmp_path / "block.onnx")
    code, out, err = moe_edge("optimize", "optimize", tmp_path / "block.onnx", "-o", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["blocks"]


def test_an_extra_is_enough_to_prune(zoo, moe_edge, tmp_path):
    by_hand = ("plan", zoo.checkpoint("vmoe"), "--experts", "0,2,5", "-o", tmp_path / "plan.json")
    assert moe_edge("prune", *by_hand)[0] == 0
    pruning = ("prune", zoo.checkpoint("vmoe"), "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned")
    code, _, err = moe_edge("prune", *pruning)
    assert (code, err) == (0, "")


def test_an_extra_is_enough_to_export(zoo, moe_edge, tmp_path):
    code, _, err = moe_edge("export", "export", zoo.checkpoint("vmoe"), "-o", tmp_path / "exported", "--dry-run")
    assert (code, err) == (0, "")
    assert (tmp_path / "exported").exists() is False


def test_an_extra_is_enough_to_build(zoo, moe_edge, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'moe-edge[tensorrt-rtx]'")
    model = tiny.write(tmp_path / "model")
    code, _, err = moe_edge("tensorrt-rtx", "build", model, "--target", "rtx-ada", "-o", tmp_path / "engine")
    assert (code, err) == (0, "")
