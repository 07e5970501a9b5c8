"""What Python users build on: plain functions for verbs, modules that say what they are, imports that stay light."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import VERBS
from docs.generate.python_api import COMMAND_LINE_ONLY, FUNCTIONS

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "pruning", "exporter", "graph_passes", "runtime", "report", "models", "moe_spec", "benchmarks")
BY_PYTHON = [verb for verb in VERBS if verb not in COMMAND_LINE_ONLY]

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


@pytest.mark.parametrize("name", [name for names in FUNCTIONS.values() for name in names])
def test_a_verb_is_plain_documented_functions(name):
    function = pkgutil.resolve_name(name)
    assert inspect.isfunction(function)
    assert f"{function.__module__}.{function.__name__}" == name
    assert inspect.getdoc(function)


@pytest.mark.parametrize("name", [name for verb in BY_PYTHON for name in FUNCTIONS[verb]])
def test_the_functions_of_a_verb_say_what_they_raise_and_know_no_command_line(name):
    function = pkgutil.resolve_name(name)
    assert "Raises:" in (inspect.getdoc(function) or "")
    assert not [name for name, kind in inspect.get_annotations(function).items() if "typer" in repr(kind)]


@pytest.mark.parametrize("verb", BY_PYTHON)
def test_a_verb_calls_the_functions_of_its_row(verb):
    """As far as imports tell: what it imports of its own name stands in its row, and all of the row is imported."""
    named = names_in(ROOT / "cli" / f"{verb}.py")
    assert set(FUNCTIONS[verb]) <= named
    assert {name for name in named if name.endswith(f".{verb}")} <= set(FUNCTIONS[verb])


def names_in(path: Path) -> set[str]:
    """Full names of what a module imports from others, and of what it takes of modules."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    taken = {
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return {*imported.values(), *(f"{imported[name]}.{part}" for name, part in taken if name in imported)}


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
