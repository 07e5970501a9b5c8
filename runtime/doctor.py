"""What works on this machine, tried and not looked up: packages, providers of ONNX Runtime, TensorRT, targets."""

import dataclasses
import importlib
import importlib.metadata
import itertools
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_spec.errors import UserError
from moe_spec.manifest import MODEL
from moe_spec.progress import Progress, silent
from runtime.backend import ENGINE_FILE
from runtime.backends import BACKENDS
from runtime.execution import Execution
from runtime.extras import MODULES
from runtime.measuring.machine import describe_machine
from runtime.onnxruntime.backend import OnnxRuntimeBackend
from runtime.providers import PROVIDERS
from runtime.targets import ONNXRUNTIME, TARGETS, TENSORRT, TENSORRT_RTX, Target
from runtime.tensorrt.driver import Driver, compute_capability_here
from runtime.tensorrt.library import load_library
from runtime.tensorrt.process import build_in_fresh_process
from runtime.tensorrt.request import BuildRequest

PRODUCT = bytes.fromhex(
    "08083a620a130a01780a017712017922064d61744d756c3a00120474696e792a1b08020802100122100000803f0000004000004040000080"
    "404201775a130a0178120e0a0c080112080a0208010a02080262130a0179120e0a0c080112080a0208010a02080242040a001011"
)
"""An ONNX model, as the onnx package is no part of a device: y (1, 2) = x (1, 2) [[1, 2], [3, 4]], in float32."""
WEIGHT = np.array([[1, 2], [3, 4]], np.float32)

_LOG = "build.log"
_ARM64, _ARM64_MACHINES = "onnxruntime-arm64", ("aarch64", "arm64")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        name: of an extra, a provider, a backend or a target.
        works: whether it did.
        what: what was found: versions, or why it does not work.
        hint: what to do about it; empty where nothing is to be done.
    """

    name: str
    works: bool
    what: str
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Health:
    """What works on this machine.

    Attributes:
        machine: processor, system and versions.
        gpu: the NVIDIA GPU.
        extras: of moe-edge.
        providers: of ONNX Runtime: a product was computed.
        backends: TensorRT's libraries: an engine was built of it.
        targets: whether engines for them are built here, and run.
    """

    machine: str
    gpu: Finding
    extras: tuple[Finding, ...]
    providers: tuple[Finding, ...]
    backends: tuple[Finding, ...]
    targets: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """For ``moe-edge doctor --json``."""
        return dataclasses.asdict(self)


def doctor(on_progress: Progress = silent) -> Health:
    """Try everything that this machine may have; what is missing or broken is a finding, not an error.

    Args:
        on_progress: called with what is tried next, how many tries are done, and how many there are.

    Raises:
        OSError: there is no room for temporary files.
    """
    libraries = [name for name in BACKENDS if name != ONNXRUNTIME]
    total, tries = len(MODULES) + len(PROVIDERS) + len(libraries), itertools.count()

    def tell(name: str) -> str:
        on_progress(f"trying {name}", next(tries), total)
        return name

    gpu, distributions = _gpu(), importlib.metadata.packages_distributions()
    extras = tuple(_extra(tell(name), modules, distributions) for name, modules in MODULES.items())
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / MODEL
        model.write_bytes(PRODUCT)
        providers = {row.name: _provider(tell(row.name), row.package, model) for row in PROVIDERS}
        backends = {name: _library(tell(name), model, gpu) for name in libraries}
    targets = tuple(_target(row, backends.get(row.backend) or providers[row.provider]) for row in TARGETS)
    return Health(describe_machine(), gpu, extras, tuple(providers.values()), tuple(backends.values()), targets)


def _gpu() -> Finding:
    try:
        return Finding("gpu", works=True, what=f"compute capability {Driver().compute_capability()}")
    except UserError as error:
        return Finding("gpu", works=False, what=error.what, hint=error.hint)


def _extra(name: str, modules: Sequence[str], distributions: Mapping[str, Sequence[str]]) -> Finding:
    """Import what the extra brings."""
    found: list[str] = []
    missing: list[str] = []
    broken: list[str] = []
    for module in modules:
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing.append(str(error.name))
        except Exception as error:  # what does not fit its libraries may raise anything, as numpy a ValueError
            broken.append(f"{module} cannot be imported: {' '.join(str(error).split())}")
        else:
            (distribution, *_) = distributions.get(module, [module])
            found.append(f"{distribution} {importlib.metadata.version(distribution)}")
    if missing:
        broken.append(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")
    hint = f"pip install 'moe-edge[{name}]'" if broken else ""
    return Finding(name, works=not broken, what="; ".join(broken) or ", ".join(found), hint=hint)


def _provider(name: str, package: str, model: Path) -> Finding:
    """Compute a product with it."""
    try:
        with OnnxRuntimeBackend(1, Execution(name)).open(model) as session:
            product = session.run({"x": np.ones((1, 2), np.float32)})["y"]
    except UserError as error:
        return Finding(name, works=False, what=error.what, hint=error.hint)
    if not np.array_equal(product, WEIGHT.sum(axis=0, keepdims=True)):
        said = f"it computes {product.tolist()} where {WEIGHT.sum(axis=0).tolist()} is right"
        return Finding(name, works=False, what=said, hint=f"install another {package}")
    return Finding(name, works=True, what="computes")


def _library(name: str, model: Path, gpu: Finding) -> Finding:
    """Build an engine with it; TensorRT does that on a GPU only."""
    try:
        version = load_library(name).__version__
        if name == TENSORRT and not gpu.works:
            return Finding(name, works=False, what=f"{version} builds on a GPU: {gpu.what}", hint=gpu.hint)
        target = next(row for row in TARGETS if row.backend == name)
        capabilities = () if target.compute_capability is None else (target.compute_capability,)
        start, engine = time.perf_counter(), model.with_name(ENGINE_FILE)
        build_in_fresh_process(
            BuildRequest(name, target.name, model, engine, capabilities, profiles=()), model.with_name(_LOG)
        )
    except UserError as error:
        return Finding(name, works=False, what=error.what, hint=error.hint)
    return Finding(name, works=True, what=f"{version}, builds an engine in {time.perf_counter() - start:.1f} s")


def _target(target: Target, needed: Finding) -> Finding:
    """Whether engines for it are built here; TensorRT's also need such a GPU to run."""
    if not needed.works:
        said = f"needs {needed.name}, which does not work here"
        hint = f"let it be built there: moe-edge bundle MODEL --target {target.name} -o bundle"
        return Finding(target.name, works=False, what=said, hint=hint * (target.backend == TENSORRT))
    why_not = BACKENDS[target.backend].why_not_here(target)
    if why_not:
        return Finding(target.name, works=False, what="; ".join(why_not))
    if target.name == _ARM64 and platform.machine().lower() not in _ARM64_MACHINES:
        return Finding(target.name, works=True, what="builds here; runs on arm64")
    if target.backend != TENSORRT_RTX or target.compute_capability == compute_capability_here():
        return Finding(target.name, works=True, what="builds and runs here")
    return Finding(target.name, works=True, what=f"builds here; runs on compute capability {target.compute_capability}")
