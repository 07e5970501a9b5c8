"""What is published is what is in the repository: nothing is left out of the wheel, nothing else is in it."""

import ast
import fnmatch
import importlib.metadata
import re
import sys
import tarfile
import tomllib
import zipfile

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.installed import BESIDE, PACKAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
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


def test_the_wheel_holds_every_file_of_the_packages_and_the_licences(package):
    (wheel,) = (package / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {name for name in names if ".dist-info/" not in name}
    assert own == sources(package)
    assert own >= {f"{name}/py.typed" for name in PACKAGES}
    licences = {name.rpartition("/licenses/")[2] for name in names if ".dist-info/licenses/" in name}
    assert licences == set(PROJECT["license-files"])


def test_the_sdist_holds_them_too_and_how_to_cite_it(package):
    (archive,) = (package / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names >= sources(package) | set(BESIDE)


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert set(cited) >= {"cff-version", "message", "title", "authors"}  # the others may be left out
    said = {"title": "name", "version": "version", "abstract": "description", "authors": "authors"}
    assert {key: cited[key] for key in said} == {key: PROJECT[name] for key, name in said.items()}
    assert cited["license"] == PROJECT["license"].partition(" AND ")[0]  # the code's; of several one could choose


def test_a_licence_and_an_origin_are_told_of_every_file_of_data(package):
    rows = re.findall(r"^(\S+/\S+) +(\S+)  +\S.*$", (ROOT / "NOTICE").read_text("utf-8"), re.MULTILINE)
    told = {pattern: fnmatch.filter(sources(package), pattern) for pattern, _ in rows}
    assert [pattern for pattern, names in told.items() if not names] == []
    data = {name for name in sources(package) if not name.endswith((".py", ".md"))}
    assert data - {name for names in told.values() for name in names} == set()
    assert " AND ".join(sorted({licence for _, licence in rows})) == PROJECT["license"]


def imported(package):
    """Names of all that the modules of a package import, at any depth of the code."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module or ""


def test_what_the_packages_import_is_asked_for():
    extras = [text for name, texts in PROJECT["optional-dependencies"].items() if name != "test" for text in texts]
    asked = {canonicalize_name(Requirement(text).name) for text in (*PROJECT["dependencies"], *extras)}
    modules = {name.partition(".")[0] for package in PACKAGES for name in imported(package)}
    brought_by = {**importlib.metadata.packages_distributions(), **{name: [whole] for name, whole in WITH.items()}}
    others = modules - sys.stdlib_module_names - set(PACKAGES)
    assert {name for name in others if not {*map(canonicalize_name, brought_by.get(name, []))} & asked} == set()
