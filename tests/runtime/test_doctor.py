"""What the doctor says was tried; what is missing or broken has a reason and a remedy."""

import importlib.metadata
import platform
import sys
import tomllib
from pathlib import Path

import onnx
import onnx.parser
import pytest
from packaging.requirements import Requirement

from runtime import doctor
from runtime.extras import MODULES
from runtime.targets import TARGETS, find_target
from runtime.tensorrt.library import load_library

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
NOT_FOR_USERS = {"all", "test"}
"""Extras that are others together, and that only tests need."""

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
tiny (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }
"""


def extra(name):
    return doctor._extra(name, MODULES[name], importlib.metadata.packages_distributions())


def test_the_model_is_what_its_docstring_says():
    model = onnx.load_from_string(doctor.PRODUCT)
    onnx.checker.check_model(model)
    assert model == onnx.parser.parse_model(TEXT)


def test_every_extra_is_looked_at():
    assert set(MODULES) == set(EXTRAS) - NOT_FOR_USERS


@pytest.mark.parametrize("name", MODULES)
def test_every_package_of_an_extra_is_imported(name):
    of_distribution: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            of_distribution.setdefault(distribution.lower().replace("_", "-"), set()).add(module)
    for requirement in map(Requirement, EXTRAS[name]):
        guess = {requirement.name.replace("-", "_")}  # of what is not installed, or brings others that are
        found = of_distribution.get(requirement.name, guess) | guess
        assert requirement.name == "moe-edge" or found & set(MODULES[name]), requirement


def test_what_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert extra("text") == doctor.Finding(
        "text", works=False, what="jinja2 is not installed", hint="pip install 'moe-edge[text]'"
    )


def test_all_that_is_not_installed_is_named_at_once(monkeypatch):
    for module in ("vl_convert", "jinja2"):
        monkeypatch.setitem(sys.modules, module, None)
    assert extra("report").what == "vl_convert, jinja2 are not installed"


@pytest.mark.parametrize("kind", ["OSError", "ValueError", "AttributeError"])
def test_a_package_that_breaks_says_why(kind, monkeypatch, tmp_path):
    (tmp_path / "jinja2.py").write_text(f"raise {kind}('libjinja.so:\\n not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jinja2", raising=False)
    assert extra("text").what == "jinja2 cannot be imported: libjinja.so: not found"


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(doctor.PRODUCT)
    return tmp_path / "model.onnx"


def test_a_provider_that_computes_something_else_does_not_work(model, monkeypatch):
    assert doctor._provider("cpu", "onnxruntime", model) == doctor.Finding("cpu", works=True, what="computes")
    monkeypatch.setattr(doctor, "WEIGHT", doctor.WEIGHT + 1)
    assert doctor._provider("cpu", "onnxruntime", model) == doctor.Finding(
        "cpu",
        works=False,
        what="it computes [[4.0, 6.0]] where [6.0, 8.0] is right",
        hint="install another onnxruntime",
    )


def test_a_provider_of_another_system_says_what_it_needs(model):
    found = doctor._provider("directml", "onnxruntime-directml", model)
    assert not found.works
    assert "has no provider directml" in found.what
    assert "on Windows only" in found.hint


def test_tensorrt_without_a_gpu_says_so(model, monkeypatch):
    monkeypatch.setattr(doctor, "load_library", lambda _: type("library", (), {"__version__": "10.9"}))
    gpu = doctor.Finding("gpu", works=False, what="there is no NVIDIA driver here", hint="install it")
    assert doctor._library("tensorrt", model, gpu) == doctor.Finding(
        "tensorrt", works=False, what="10.9 builds on a GPU: there is no NVIDIA driver here", hint="install it"
    )


def test_a_target_is_as_well_as_what_it_needs():
    well, ill = (doctor.Finding("onnxruntime-cpu", works=works, what="computes") for works in (True, False))
    assert doctor._target(find_target("cpu"), well).what == "builds and runs here"
    assert doctor._target(find_target("cpu"), ill).what == "needs onnxruntime-cpu, which does not work here"
    assert doctor._target(find_target("a100"), ill).hint == (
        "let it be built there: moe-edge bundle MODEL --target a100 -o bundle"
    )
    assert doctor._target(find_target("onnxruntime-openvino"), well).what.startswith("openvino compiles a graph when")


@pytest.mark.parametrize(
    ("machine", "said"), [("x86_64", "builds here; runs on arm64"), ("arm64", "builds and runs here")]
)
def test_an_arm_target_runs_on_arm(machine, said, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    well = doctor.Finding("cpu", works=True, what="computes")
    assert doctor._target(find_target("onnxruntime-arm64"), well).what == said


def test_everything_here_is_tried():
    said = []
    health = doctor.doctor(lambda *step: said.append(step))
    assert [name for name, _, _ in said] == [
        f"trying {found.name}" for found in (*health.extras, *health.providers, *health.backends)
    ]
    assert [done for _, done, _ in said] == list(range(len(said)))
    assert {total for *_, total in said} == {len(said)}
    works = {found.name: found.works for found in (*health.extras, *health.targets)}
    assert all(works[name] for name in ("optimize", "export", "prune", "text", "onnxruntime-cpu"))
    assert [found.name for found in health.targets] == [row.name for row in TARGETS]
    assert all(found.works or found.what for found in (*health.providers, *health.targets))


def test_tensorrt_rtx_builds_an_engine(model):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'moe-edge[tensorrt-rtx]'")
    found = doctor._library("tensorrt-rtx", model, doctor.Finding("gpu", works=False, what="none"))
    assert found.works
    assert found.what.startswith(f"{load_library('tensorrt-rtx').__version__}, builds an engine in ")
    model.write_bytes(doctor.PRODUCT[:-4])
    assert not doctor._library("tensorrt-rtx", model, found).works
