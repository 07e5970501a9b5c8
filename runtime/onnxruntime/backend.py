"""The backend of ONNX Runtime: runs .onnx files and model directories as they are.

A build is ONNX Runtime's own graph optimisation done ahead of time, so that a device need not repeat it at every start.
Executed by the tests: the CPU provider, and OpenVINO's where it is installed. Other providers are asked for by name and
never replaced silently.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import new_directory, require_room
from moe_spec.manifest import FILE_NAME, MODEL, Manifest
from moe_spec.progress import Progress, counted, silent
from moe_spec.runner import Arrays, Feeds
from runtime.backend import ENGINE, BuildOptions
from runtime.engine import check_engine, finish_engine, rebuild
from runtime.execution import BY_DEFAULT, Execution
from runtime.model_dir import model_bytes, model_file, why_not_buildable
from runtime.onnx_file import check_external_data, float_types, read_tensors
from runtime.onnxruntime.graph_cache import directory_for_provider, kept_graph
from runtime.onnxruntime.library import (
    is_not_implemented,
    load,
    session_options,
    version,
    why_not_here,
    write_optimized,
)
from runtime.onnxruntime.session import OnnxRuntimeSession
from runtime.providers import find_provider
from runtime.targets import ONNXRUNTIME, Target

BFLOAT16, FLOAT4 = "bfloat16", "float4e2m1"
_NO_FLOAT4 = (
    "ONNX Runtime has no kernels for it: nvfp4 is for TensorRT, moe-edge build --target rtx-blackwell; here moe-edge "
    "verify compares such a model, and observed.cpu.onnx beside it runs"
)
_NO_BFLOAT16 = (
    "ONNX Runtime has next to no kernels for it on a CPU: export for here with --dtype fp32; bfloat16 is for TensorRT, "
    "moe-edge optimize --no-prove and build --target rtx-ada"
)
_COMPILES = (
    "{0} compiles a graph when it is opened, so nothing is done ahead: give the model itself to run --provider {0}, "
    "and --cache to keep what it made of it"
)
_EXTERNAL_FROM_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeBackend:
    """ONNX Runtime with one execution provider.

    Attributes:
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how models are run.
    """

    threads: int = 0
    execution: Execution = BY_DEFAULT
    name: str = ONNXRUNTIME

    def why_not(self, model_dir: Path, target: Target) -> list[str]:
        """Reasons why this model cannot be built for ``target`` here; empty: it can."""
        return [*why_not_buildable(model_dir, target), *self.why_not_here(target)]

    def why_not_here(self, target: Target) -> list[str]:
        """Reasons why nothing can be built for ``target`` on this machine."""
        provider = find_provider(target.provider)
        here = why_not_here(provider) if provider.writes_graph else _COMPILES.format(provider.name)
        return [] if here is None else [here]

    def build(
        self,
        model_dir: Path,
        target: Target,
        options: BuildOptions,
        out_dir: Path,
        on_progress: Progress = silent,  # noqa: ARG002 - it takes a moment and tells nothing
    ) -> Manifest:
        """Write the graph as ONNX Runtime optimises it, with its weights beside it.

        Raises:
            UserError: options that only TensorRT has, a damaged model, a provider that does not start here, or an
                existing ``out_dir``.
        """
        if options != BuildOptions():
            raise UserError(
                f"ONNX Runtime takes any shape and none of TensorRT's options: {' '.join(options.arguments())}",
                hint="leave these options out, or give a TensorRT target",
            )
        source = model_file(model_dir)
        check_external_data(source)
        execution = dataclasses.replace(self.execution, provider=target.provider)
        with new_directory(out_dir) as staging:
            session = self._optimize(source, staging / MODEL, execution, packed=False)
            return finish_engine(
                model_dir,
                target,
                staging,
                inputs=session.inputs,
                outputs=session.outputs,
                tools={"onnxruntime": version()},
                details={"provider": execution.asked.official},
            )

    def open(self, engine_dir: Path) -> OnnxRuntimeSession:
        """A session of an engine, of a model directory, or of an .onnx file.

        Raises:
            UserError: nothing there, a damaged or untrustworthy file, or a provider that is not to be had.
        """
        path, execution = model_file(engine_dir), self.execution
        check_external_data(path)
        if (engine_dir / FILE_NAME).is_file() and Manifest.load(engine_dir).kind == ENGINE:
            manifest = check_engine(engine_dir, self.name, "onnxruntime", version())
            execution = _of_engine(engine_dir, manifest, execution)
            return self._load(path, execution, str(engine_dir), optimize=False)
        if execution.cache is None:
            return self._load(path, execution, str(engine_dir))
        if not execution.asked.writes_graph:
            execution = execution.settled(self.threads, directory_for_provider(path, execution, version()))
            return self._load(path, execution, str(engine_dir))
        kept = kept_graph(path, execution, version(), lambda out: self._optimize(path, out, execution, packed=True))
        return self._load(kept, execution, str(engine_dir), optimize=False)

    def _optimize(self, source: Path, out: Path, execution: Execution, *, packed: bool) -> OnnxRuntimeSession:
        """Write ``source`` to ``out`` as ONNX Runtime makes it for the provider, see `write_optimized`."""
        options = session_options(self.threads, execution)
        write_optimized(options, out, _EXTERNAL_FROM_BYTES, packed=packed)
        try:
            return _session(source, options, execution.settled(self.threads), str(source))
        except UserError:
            require_room(out.parent, model_bytes(source))  # ONNX Runtime fails to load what it cannot write
            raise

    def _load(self, path: Path, execution: Execution, where: str, *, optimize: bool = True) -> OnnxRuntimeSession:
        options = session_options(self.threads, execution, optimize=optimize)
        return _session(path, options, execution.settled(self.threads), where)


def _session(path: Path, options: object, execution: Execution, where: str) -> OnnxRuntimeSession:
    try:
        session = OnnxRuntimeSession(load(path, options, execution), where, execution)
    except UserError as error:
        found = float_types(read_tensors(path)) if is_not_implemented(error.__cause__) else []
        if FLOAT4 in found:
            raise UserError(f"{error.what}; its weights are {FLOAT4}", hint=_NO_FLOAT4) from error
        if BFLOAT16 in found:
            raise UserError(f"{error.what}; it computes in bfloat16", hint=_NO_BFLOAT16) from error
        raise
    for spec in (*session.inputs, *session.outputs):
        if spec.dtype == BFLOAT16:
            raise UserError(f"{spec.name} of {path} is bfloat16, which numpy lacks", hint=_NO_BFLOAT16)
    return session


def _of_engine(engine_dir: Path, manifest: Manifest, execution: Execution) -> Execution:
    """``execution`` with the provider that an engine was built for."""
    built = find_provider(manifest.details["provider"])
    if execution.provider is not None and execution.asked != built:
        raise UserError(
            f"{engine_dir} was built for {built.name}, asked for {execution.asked.name}", hint=rebuild(manifest)
        )
    if execution.cache is not None:
        raise UserError(
            f"{engine_dir} is an engine, of which a cache keeps nothing", hint="leave --cache out, or give the model"
        )
    return dataclasses.replace(execution, provider=built.name)


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeRunner:
    """Runs ONNX files for stages that must not import ONNX Runtime (``moe_spec.runner.Runner``).

    Attributes:
        threads: that one operator may use; 0 for one a core.
        on_progress: told of every batch that `run` is through with.
    """

    threads: int = 0
    on_progress: Progress = silent

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
            each = counted(batches, f"running {model.name}", len(batches), self.on_progress)
            return [session.run(feeds, outputs) for feeds in each]
