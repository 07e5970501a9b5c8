"""The backends there are, and the one way to open anything that runs."""

from collections.abc import Mapping
from pathlib import Path

from moe_spec.errors import UserError, did_you_mean
from moe_spec.manifest import FILE_NAME, Manifest
from runtime.backend import ENGINE, Backend, Session
from runtime.onnxruntime_backend import OnnxRuntimeBackend
from runtime.targets import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from runtime.tensorrt.backend import TensorRTBackend

BACKENDS: Mapping[str, Backend] = {
    ONNXRUNTIME: OnnxRuntimeBackend(),
    TENSORRT: TensorRTBackend(TENSORRT),
    TENSORRT_RTX: TensorRTBackend(TENSORRT_RTX),
}


def open_session(path: Path, threads: int = 0) -> Session:
    """A session of an engine directory, a model directory or an .onnx file.

    Args:
        path: what to open; models run on ONNX Runtime's CPU provider, engines on what they were built for.
        threads: that one operator may use on a CPU; 0 for one a core.

    Raises:
        UserError: there is nothing to run, it is damaged, or it cannot run here.
    """
    name = engine_backend(path)
    if name is None or name == ONNXRUNTIME:
        return OnnxRuntimeBackend(threads=threads).open(path)
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
