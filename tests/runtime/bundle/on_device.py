"""Run verify.py of a bundle in this process, TensorRT being a stand-in whose engines ONNX Runtime computes."""

import argparse
import ctypes
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime

from runtime.bundle.scripts import DEVICE
from runtime.tensorrt import driver
from tests.runtime.tensorrt.gpu_stand_in import HostDriver, read

OUTPUT = "output"


def program(monkeypatch) -> dict[str, Any]:
    """Names of verify.py, run here: it changes how Python imports."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    names = {"__name__": "verify", "__file__": str(DEVICE / "verify.py")}
    exec(compile((DEVICE / "verify.py").read_text(), "verify.py", "exec"), names)
    return names


def verify_with_tensorrt(bundle: Path, monkeypatch) -> int:
    """The exit code of ``verify.py --backend tensorrt``, for engines that `write_engine` wrote."""
    monkeypatch.setitem(sys.modules, "tensorrt", LIBRARY)
    monkeypatch.setattr(driver, "Driver", Driver)
    Context.profiles_used = []
    code: int = program(monkeypatch)["verify"](bundle, argparse.Namespace(backend="tensorrt", engine=None))
    return code


def write_engine(plan: Path, graph: Path, profiles: list[Any]) -> None:
    """A plan of ``graph``, which has only float32 in and out, for shapes that stand in ``profiles``."""
    plan.parent.mkdir(exist_ok=True)
    plan.write_text(json.dumps({"graph": str(graph), "profiles": profiles}))


class Driver(HostDriver):
    """Of a Jetson Orin."""

    def compute_capability(self) -> str:
        return "8.7"


class Context:
    """``IExecutionContext``: it takes the shapes of its profile."""

    profiles_used: ClassVar[list[int]] = []
    """Of all contexts, one for each run."""

    def __init__(self, session: onnxruntime.InferenceSession, profiles: list[Any]) -> None:
        self._session, self._profiles, self._profile = session, profiles, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self._profile = index
        return index < len(self._profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        allowed = self._profiles[self._profile][name]
        self._shapes[name] = shape
        return all(low <= dim <= high for low, dim, high in zip(allowed["min"], shape, allowed["max"], strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._results()[name].shape

    def execute_async_v3(self, _stream: int) -> bool:
        for name, array in self._results().items():
            ctypes.memmove(self._addresses[name], array.ctypes.data, array.nbytes)
        self.profiles_used.append(self._profile)
        return True

    def _results(self) -> dict[str, np.ndarray[Any, Any]]:
        feeds = {
            name: read(self._addresses[name], int(np.prod(shape))).reshape(shape)
            for name, shape in self._shapes.items()
        }
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, feeds), strict=True))


class Engine:
    """``ICudaEngine``."""

    def __init__(self, plan: bytes) -> None:
        made = json.loads(plan)
        self._session, self._profiles = onnxruntime.InferenceSession(made["graph"]), made["profiles"]
        outputs = [output.name for output in self._session.get_outputs()]
        self._modes = {"x": "input"} | dict.fromkeys(outputs, OUTPUT)
        self.num_io_tensors = len(self._modes)

    def get_tensor_name(self, index: int) -> str:
        return list(self._modes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return self._modes[name]

    def get_tensor_dtype(self, _name: str) -> type:
        return np.float32

    def create_execution_context(self) -> Context:
        return Context(self._session, self._profiles)


class Logger:
    """``Logger``."""

    ERROR = 1

    def __init__(self, _severity: int) -> None: ...


LIBRARY = types.SimpleNamespace(
    __version__="10.3.0",
    Logger=Logger,
    Runtime=lambda _logger: types.SimpleNamespace(deserialize_cuda_engine=Engine),
    TensorIOMode=types.SimpleNamespace(OUTPUT=OUTPUT),
    nptype=lambda dtype: dtype,
)
