"""The backends there are, and the one way to open anything that runs."""

from collections.abc import Mapping
from pathlib import Path

from moe_spec.errors import UserError, did_you_mean
from moe_spec.manifest import FILE_NAME, Manifest
from runtime.backend import ENGINE, Backend, Session
from runtime.execution import BY_DEFAULT, Execution
from runtime.onnxruntime.backend import OnnxRuntimeBackend
from runtime.targets import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from runtime.tensorrt.backend import TensorRTBackend

BACKENDS: Mapping[str, Backend] = {
    ONNXRUNTIME: OnnxRuntimeBackend(),
    TENSORRT: TensorRTBackend(TENSORRT),
    TENSORRT_RTX: TensorRTBackend(TENSORRT_RTX),
}


def open_session(path: Path, threads: int = 0, execution: Execution = BY_DEFAULT) -> Session:
    """A session of an engine directory, a model directory or an .onnx file.

    Args:
        path: what to open; models run on ONNX Runtime, engines on what they were built for.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run it; by default on the CPU, or as its engine was built.

    Raises:
        UserError: there is nothing to run, it is damaged, or it cannot run here or in that way.
    """
    name = engine_backend(path)
    if name is None or name == ONNXRUNTIME:
        return OnnxRuntimeBackend(threads, execution).open(path)
    if execution != BY_DEFAULT:
        raise UserError(
            f"{path} is an engine of {name}, which ONNX Runtime does not run",
            hint="leave out --provider and what goes with it, or give the model that it was built from",
        )
    return BACKENDS[name].open(path)


def engine_backend(path: Path) -> str | None:
    """The backend that built the engine directory ``path``; None for models.

    Raises:
        UserError: it was built by a backend that this moe-edge does not have.
    """
    if not (path / FILE_NAME).is_file():
        return None
    manifest = Manifest.load(path)
    if manifest.kind != ENGINE:
        return None
    name = str(manifest.details.get("backend"))
    if name not in BACKENDS:
        raise UserError(f"{path} is an engine of the unknown backend {name!r}", hint=did_you_mean(name, BACKENDS))
    return name
