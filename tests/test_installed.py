"""What is installed from the wheel works: the base package by itself, and each extra with it and nothing else."""

import importlib.metadata
import json
import re
import string
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import gguf
import numpy as np
import PIL.Image
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from graph_passes.optimize import optimize
from graph_passes.proof.mask import mask_model
from models.vmoe.assets import fashion_mnist
from runtime.extras import MODULES
from tests.cli.helpers import done
from tests.graph_passes.block_models import save, spec_of
from tests.installed import NAME, ROOT, Environment, install_base, install_extra, needed, pip
from tests.report import runs
from tests.runtime import tiny
from tests.sample_models import SAMPLE_MODELS
from tests.zoo import RUNNER, Zoo

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
TOGETHER = {"all", "test"}
"""Extras that are others together, and what the tests themselves need."""

IMAGES = 20

BASE = {
    "help": ("--help", "Prove and run"),
    "run": ("run {model} --input {images} --input {data}", rf"^{2 * IMAGES} examples: logits \[{2 * IMAGES}, 10\]\n"),
    "verify": ("verify {model} --reference {reference} --data {data}", rf"^PASS: {IMAGES} examples of task data"),
    "bench": ("bench {model} {reference} --batch-size 1 --repeats 2 --warmup 1 --json", r'"median_ms": \d'),
    "targets": ("targets {model}", r"^\S+: 15 of 15 targets take it"),
    "build": ("build {model} --target cpu -o {out}", r": onnxruntime-cpu, [\d,]+ bytes\n$"),
    "bundle": ("bundle {model} --target jetson-orin -o {out}", r": for jetson-orin, .* 3 golden cases"),
    "doctor": ("doctor --json", r'"what": "computes"'),
}
"""What a device does: the arguments, and what is printed."""

REFUSED = {
    "inspect": ("inspect {checkpoint}", "export"),
    "upcycle": ("upcycle {checkpoint} {checkpoint} --top-k 1 -o {out}", "export"),
    "calibrate": ("calibrate {checkpoint} --data {data} -o {out}", "export"),
    "plan": ("plan {checkpoint} --experts 0,2 -o {out}", "export"),
    "prune": ("prune {checkpoint} --plan plan.json -o {out}", "export"),
    "finetune": ("finetune {checkpoint} --data {data} -o {out}", "export"),
    "export": ("export {checkpoint} -o {out}", "export"),
    "optimize": ("optimize {reference} -o {out}", "optimize"),
    "report": ("report {model} -o {out}", "report"),
    "demo": ("demo -o {out}", "export"),
    "run": ("run {decoder} --prompt w5", "text"),
}
"""What a device does not: the arguments, and the extra that the refusal names."""

ALONE = {
    "optimize": ("moe-edge optimize {block} -o {out}", r"^\S+: proven to "),
    "prune": ("moe-edge prune {vmoe} --plan {plan} -o {out}", r": [\d,]+ bytes of weights, [\d,]+ before\n$"),
    "export": ("moe-edge export {vmoe} -o {out}", r"2 MoE layers"),
    "tensorrt": ("moe-edge build {tiny} --target a100 -o {out}", r": a100, [\d,]+ bytes"),
    "tensorrt-rtx": ("moe-edge build {tiny} --target rtx-ada -o {out}", r": rtx-ada, [\d,]+ bytes"),
    "report": ("moe-edge report {artifacts} -o {out}", r"^optimized does not compute what it should: "),
    "text": ("moe-edge run {decoder} --prompt w5 --max-new-tokens 4 --chat", r"^(w\d+ ){3}w\d+\n$"),
    "samples": ("python -I {read_gguf} {quantized}", r"^7520 parameters\n$"),
    "bench": ("python -m benchmarks.simplifiers --quick", r"(?s)^(?!.*not installed).*\| onnxsim \| \d"),
    "docs": ("python -m mkdocs build --strict --quiet --site-dir {out}", r"^$"),
}
"""What each extra is for: a command, and what is printed."""

MISSING = """
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
"""
ONE_BY_ONE = """
import json, sys
from cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as leaving:
        print(leaving.code)
"""
READ_GGUF = """
import sys
from transformers import AutoModelForCausalLM
directory, _, name = sys.argv[1].rpartition("/")
print(AutoModelForCausalLM.from_pretrained(directory, gguf_file=name).num_parameters(), "parameters")
"""


def once(name: str, make: Callable[[Zoo, Path], object]) -> Callable[[Zoo], Path]:
    """A thing that is made once for all tests."""
    return lambda zoo: zoo.once(f"installed.{name}", partial(make, zoo))


def write_model(zoo: Zoo, path: Path) -> None:
    """The embedded V-MoE with half of its experts."""
    exported = SAMPLE_MODELS["pruned"].make(zoo)
    optimize(exported, path, RUNNER, plan=SAMPLE_MODELS["pruned"].plan(exported), form="dense", prove=False)


def write_reference(zoo: Zoo, path: Path) -> None:
    """The same with all experts, half of which cannot be chosen."""
    exported = SAMPLE_MODELS["pruned"].make(zoo)
    mask_model(exported, SAMPLE_MODELS["pruned"].plan(exported), path)


def write_data(_zoo: Zoo, path: Path) -> None:
    with np.load(fashion_mnist() / "test.npz") as test:
        np.savez(path, images=test["images"][:IMAGES], labels=test["labels"][:IMAGES])


def write_images(_zoo: Zoo, path: Path) -> None:
    path.mkdir()
    with np.load(fashion_mnist() / "test.npz") as test:
        for index, pixels in enumerate(test["images"][:IMAGES]):
            PIL.Image.fromarray(pixels).save(path / f"{index}.png")


def write_quantized(_zoo: Zoo, path: Path) -> None:
    """A Llama of one layer, whose products are in four bits, as SmolLM2 comes to sample 7."""
    writer, four_bits = gguf.GGUFWriter(path, "llama"), gguf.GGMLQuantizationType.Q4_1
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        weight = gguf.quants.quantize(np.ones((32, 32), np.float32), four_bits)
        writer.add_tensor(f"blk.0.{name}.weight", weight, raw_dtype=four_bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


THINGS: dict[str, Callable[[Zoo], Path]] = {
    "artifacts": once("artifacts", lambda _, path: runs.failing(path)),
    "block": once("block.onnx", lambda _, path: save(spec_of("masked_loop", "softmax"), path)),
    "checkpoint": lambda _: fashion_mnist(),
    "data": once("data.npz", write_data),
    "decoder": lambda zoo: zoo.cached("mixtral"),
    "images": once("images", write_images),
    "model": once("model", write_model),
    "plan": once("plan.json", lambda zoo, path: done("plan", zoo.checkpoint("vmoe"), "--experts", "0,2,5", "-o", path)),
    "quantized": once("quantized.gguf", write_quantized),
    "read_gguf": once("read_gguf.py", lambda _, path: path.write_text(READ_GGUF)),
    "reference": once("reference", write_reference),
    "tiny": once("tiny", lambda _, path: tiny.write(path)),
    "vmoe": lambda zoo: zoo.checkpoint("vmoe"),
}
"""What stands in braces in the tables above."""


@pytest.fixture
def words(zoo, tmp_path):
    """The words of a command, with what it asks for made."""

    def split(command: str) -> list[str]:
        names = {name for _, name, _, _ in string.Formatter().parse(command) if name} - {"out"}
        return command.format(out=tmp_path / "out", **{name: THINGS[name](zoo) for name in names}).split()

    return split


@pytest.fixture(scope="session")
def base(zoo, package):
    return Environment(zoo.once("environment", partial(install_base, package)))


def test_every_extra_is_tried_alone():
    assert set(ALONE) == set(EXTRAS) - TOGETHER == set(MODULES)


def test_pip_misses_nothing_and_what_is_not_asked_for_is_not_there(base):
    assert pip(base, "check") == "No broken requirements found.\n"
    asked = {canonicalize_name(one.metadata["Name"]) for one in needed(base.moe_edge)}
    known = importlib.metadata.packages_distributions()
    others = {name for name, brought_by in known.items() if not {*map(canonicalize_name, brought_by)} & {*asked, NAME}}
    assert others > {"torch", "transformers", "onnx", "onnx_graphsurgeon", "scipy", "jinja2", "tokenizers"}
    code, out, err = base.run("python", "-I", "-c", MISSING, *sorted(known))
    assert (code, err) == (0, "")
    assert set(out.split()) == others


@pytest.mark.parametrize("does", BASE)
def test_the_base_package_is_enough_for_a_device(does, base, words):
    command, printed = BASE[does]
    code, out, err = base.run("moe-edge", *words(command))
    assert (code, err) == (0, "")
    assert re.search(printed, out), out


def test_what_the_base_package_lacks_names_its_extra(base, words):
    code, out, err = base.run(
        "python", "-I", "-c", ONE_BY_ONE, json.dumps([words(command) for command, _ in REFUSED.values()])
    )
    assert (code, out.split()) == (0, ["1"] * len(REFUSED)), err
    hints = [f"hint: pip install 'moe-edge[{extra}]'" for _, extra in REFUSED.values()]
    assert [line for line in err.splitlines() if line.startswith("hint: ")] == hints


@pytest.mark.parametrize("extra", ALONE)
def test_an_extra_alone_is_enough_for_what_it_is_for(extra, base, words, tmp_path):
    try:
        environment = install_extra(base, extra, tmp_path / "environment")
    except PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed: pip install 'moe-edge[{extra}]'")
    command, printed = ALONE[extra]
    code, out, err = environment.run(*words(command), cwd=ROOT)
    assert code == 0, err
    assert re.search(printed, out), out
    assert (tmp_path / "out").exists() == ("{out}" in command)


def test_the_constraints_are_of_all_that_is_installed(base):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    constrained = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    installed = {
        canonicalize_name(one.metadata["Name"])
        for extra in ("all", "docs", "test")
        for one in needed(base.moe_edge, extra)
    }
    assert installed - constrained == set()
