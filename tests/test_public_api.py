"""What Python users build on: one plain function a verb, modules that say what they are, imports that stay light."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import VERBS
from docs.generate.python_api import COMMAND_LINE_ONLY, FUNCTIONS

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "pruning", "exporter", "graph_passes", "runtime", "report", "models", "moe_spec", "benchmarks")

HEAVY = (
    *("torch", "transformers", "scipy", "sklearn", "onnx", "onnx_graphsurgeon", "onnxruntime", "tensorrt_rtx"),
    *("jinja2", "numpy", "PIL", "safetensors", "vl_convert"),
)


def python(code: str, *arguments: object) -> str:
    """What ``code`` prints in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_verb_has_its_row():
    assert tuple(FUNCTIONS) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_plain_documented_function(verb):
    function = getattr(importlib.import_module(FUNCTIONS[verb]), verb)
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in COMMAND_LINE_ONLY])
def test_the_function_of_a_verb_says_what_it_raises_and_knows_no_command_line(verb):
    function = getattr(importlib.import_module(FUNCTIONS[verb]), verb)
    assert "Raises:" in (inspect.getdoc(function) or "")
    assert not [name for name, kind in inspect.get_annotations(function).items() if "typer" in repr(kind)]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package):
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    assert [path for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


HELP = """
import sys

from cli.main import main

try:
    main(["--help"])
except SystemExit:
    print(sorted(set(sys.argv[1:]) & set(sys.modules)))
"""


def test_the_command_line_starts_without_heavy_imports():
    assert python(HELP, *HEAVY).splitlines()[-1] == "[]"
