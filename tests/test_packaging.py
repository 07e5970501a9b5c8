"""What is published is what is in the repository: nothing is left out of the wheel, nothing else is in it."""

import ast
import importlib.metadata
import sys
import tarfile
import tomllib
import zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.installed import BESIDE, PACKAGES, ROOT

DATA = (
    "models/support.json",
    "models/vmoe/fashion_mnist/README.md",  # the licences of the weights and of the images
    "models/vmoe/fashion_mnist/model.safetensors",
    "models/vmoe/fashion_mnist/test.npz",
    "runtime/bundle/device/verify.py",
    *(f"{package}/py.typed" for package in PACKAGES),
)
WITH = {
    "google": "onnx",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}
"""Modules of distributions that come with another, which is asked for."""


def sources(folder):
    return {path.relative_to(folder).as_posix() for name in PACKAGES for path in (folder / name).rglob("*.*")}


def test_the_wheel_holds_every_file_of_the_packages_and_the_licence(package):
    (wheel,) = (package / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {name for name in names if ".dist-info/" not in name}
    assert own == sources(package)
    assert own >= set(DATA)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_them_too_and_how_to_cite_it(package):
    (archive,) = (package / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names >= sources(package) | set(BESIDE)


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
    assert {f"version: {project['version']}", f"license: {project['license']}", f"title: {project['name']}"} <= set(
        lines
    )


def imported(package):
    """Names of all that the modules of a package import, at any depth of the code."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module or ""


def test_what_the_packages_import_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "test" for text in texts]
    asked = {canonicalize_name(Requirement(text).name) for text in (*project["dependencies"], *extras)}
    modules = {name.partition(".")[0] for package in PACKAGES for name in imported(package)}
    brought_by = {**importlib.metadata.packages_distributions(), **{name: [whole] for name, whole in WITH.items()}}
    others = modules - sys.stdlib_module_names - set(PACKAGES)
    assert {name for name in others if not {*map(canonicalize_name, brought_by.get(name, []))} & asked} == set()
