"""ONNX Runtime: the one file that imports it. Runs .onnx files and model directories as they are.

A build is ONNX Runtime's own graph optimisation done ahead of time, so that a device need not repeat it at every start.
Executed by the tests: the CPU provider. Other providers are asked for by name and never replaced silently.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from moe_spec.errors import UserError
from moe_spec.files import new_directory
from moe_spec.manifest import FILE_NAME, MODEL, Manifest, TensorSpec
from moe_spec.runner import Arrays, Feeds
from runtime.backend import ENGINE, BuildOptions, Progress
from runtime.engine import check_engine, finish_engine
from runtime.feeds import check_feeds, select_outputs
from runtime.model_dir import model_file, why_not_buildable
from runtime.onnx_file import check_external_data, float_types, read_tensors
from runtime.targets import ONNXRUNTIME, Target

CPU = "CPUExecutionProvider"
_FLOAT_ACTIVATIONS = "1"
_SILENT = 4
_EXTERNAL_FROM_BYTES = 1024
_NUMPY = {"float": "float32", "double": "float64"}
BFLOAT16 = "bfloat16"
_NO_BFLOAT16 = (
    "ONNX Runtime has next to no kernels for it on a CPU: export for here with --dtype fp32; bfloat16 is for TensorRT, "
    "moe-edge optimize --no-prove and build --target rtx-ada"
)
_ERRORS = tuple(kind for kind in vars(ort_errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
"""ONNX Runtime's errors have no common base."""


class OnnxRuntimeSession:
    """An ONNX graph that is loaded."""

    def __init__(self, session: Any, where: str) -> None:
        self._session = session
        self._where = where
        self.inputs: tuple[TensorSpec, ...] = tuple(map(_spec, session.get_inputs()))
        self.outputs: tuple[TensorSpec, ...] = tuple(map(_spec, session.get_outputs()))

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name, those asked for or all.

        Raises:
            UserError: the feeds do not fit the inputs, an output is unknown, or ONNX Runtime fails.
        """
        check_feeds(self.inputs, feeds, self._where)
        names = select_outputs(self.outputs, outputs, self._where)
        with _as_user_error(f"{self._where} cannot run on these inputs", "check the lengths of the inputs"):
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeBackend:
    """ONNX Runtime with one execution provider.

    Attributes:
        provider: ONNX Runtime's name of it.
        threads: that one operator may use; 0 for one a core.
    """

    provider: str = CPU
    threads: int = 0
    name: str = ONNXRUNTIME

    def why_not(self, model_dir: Path, target: Target) -> list[str]:
        """Reasons why this model cannot be built for ``target`` here; empty: it can."""
        return why_not_buildable(model_dir, target)

    def build(
        self,
        model_dir: Path,
        target: Target,
        options: BuildOptions,
        out_dir: Path,
        on_progress: Progress | None = None,  # noqa: ARG002 - it takes a moment and tells nothing
    ) -> Manifest:
        """Write the graph as ONNX Runtime optimises it, with its weights beside it.

        Raises:
            UserError: options that only TensorRT has, a damaged model, or an existing ``out_dir``.
        """
        if options != BuildOptions():
            raise UserError(
                f"ONNX Runtime takes any shape and none of TensorRT's options: {' '.join(options.arguments())}",
                hint="leave these options out, or give a TensorRT target",
            )
        source = model_file(model_dir)
        check_external_data(source)
        with new_directory(out_dir) as staging:
            ahead = self._options(ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
            ahead.optimized_model_filepath = str(staging / MODEL)
            prefix = "session.optimized_model_external_initializers"
            ahead.add_session_config_entry(f"{prefix}_file_name", f"{MODEL}.data")
            ahead.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(_EXTERNAL_FROM_BYTES))
            session = OnnxRuntimeSession(self._load(source, ahead), str(model_dir))
            return finish_engine(
                model_dir,
                target,
                staging,
                inputs=session.inputs,
                outputs=session.outputs,
                tools={"onnxruntime": ort.__version__},
                details={"provider": self.provider},
            )

    def open(self, engine_dir: Path) -> OnnxRuntimeSession:
        """A session of an engine, of a model directory, or of an .onnx file.

        Raises:
            UserError: nothing there, a damaged or untrustworthy file, or a provider that is not to be had.
        """
        path = model_file(engine_dir)
        check_external_data(path)
        options = self._options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
        if (engine_dir / FILE_NAME).is_file() and Manifest.load(engine_dir).kind == ENGINE:
            check_engine(engine_dir, self.name, "onnxruntime", ort.__version__)
            options = self._options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)  # it was optimised ahead of time
        return OnnxRuntimeSession(self._load(path, options), str(engine_dir))

    def _options(self, level: Any) -> Any:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = self.threads
        # a graph that dequantises weights asks for a product in float; by default activations become int8 for it
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT_ACTIVATIONS)
        return options

    def _load(self, path: Path, options: Any) -> Any:
        """A session that uses the provider asked for: ONNX Runtime itself falls back to the CPU with a log line."""
        available = ort.get_available_providers()
        hint = f"known here: {', '.join(available)}"
        if self.provider not in available:
            raise UserError(f"ONNX Runtime has no provider {self.provider!r} here", hint=hint)
        ort.set_default_logger_severity(_SILENT)
        try:
            with _as_user_error(f"{path} cannot be loaded", "copy or export the model again"):
                session = ort.InferenceSession(str(path), options, providers=[self.provider])
        except UserError as error:
            if isinstance(error.__cause__, ort_errors.NotImplemented) and BFLOAT16 in float_types(read_tensors(path)):
                raise UserError(f"{error.what}; it computes in bfloat16", hint=_NO_BFLOAT16) from error
            raise
        for value in (*session.get_inputs(), *session.get_outputs()):
            if BFLOAT16 in value.type:
                raise UserError(f"{value.name} of {path} is bfloat16, which numpy lacks", hint=_NO_BFLOAT16)
        if session.get_providers()[0] != self.provider:
            raise UserError(
                f"ONNX Runtime cannot start {self.provider}, it offers {', '.join(session.get_providers())}",
                hint="install the provider's libraries and driver, or use CPUExecutionProvider",
            )
        return session


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeRunner:
    """Runs ONNX files for stages that must not import ONNX Runtime (``moe_spec.runner.Runner``).

    Attributes:
        threads: that one operator may use; 0 for one a core.
    """

    threads: int = 0

    def open(self, model: Path) -> OnnxRuntimeSession:
        """A session of the file.

        Raises:
            UserError: the file is damaged.
        """
        return OnnxRuntimeBackend(threads=self.threads).open(model)

    def run(self, model: Path, batches: Sequence[Feeds], outputs: Sequence[str] | None = None) -> list[Arrays]:
        """Outputs by name for each batch; the file is opened once.

        Raises:
            UserError: the file is damaged, or does not take these feeds.
        """
        with self.open(model) as session:
            return [session.run(feeds, outputs) for feeds in batches]


def version() -> str:
    """Of the ONNX Runtime that is installed."""
    return str(ort.__version__)


def _spec(value: Any) -> TensorSpec:
    inner = re.fullmatch(r"tensor\((\w+)\)", value.type)
    kind = inner[1] if inner else value.type
    shape = tuple(
        dim if isinstance(dim, int) else dim or f"{value.name}_{axis}" for axis, dim in enumerate(value.shape)
    )
    return TensorSpec(value.name, _NUMPY.get(kind, kind), shape)


@contextlib.contextmanager
def _as_user_error(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        reason = str(error).partition("] : ")[2].partition(" : ")[2] or str(error)
        raise UserError(f"{what}: {' '.join(reason.split())}", hint=hint) from error
