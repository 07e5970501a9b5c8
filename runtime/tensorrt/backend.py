"""TensorRT and TensorRT-RTX as a backend.

Executed by the tests: builds with TensorRT-RTX, which need no GPU. ``tensorrt`` takes the same path, but builds on the
device only; it was type-checked, not run.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import new_directory
from moe_spec.manifest import Manifest, TensorSpec
from runtime.backend import ENGINE_FILE, BuildOptions
from runtime.engine import check_engine, finish_engine, profile_to_json
from runtime.model_dir import model_file, why_not_buildable
from runtime.onnx_file import check_external_data, float_types
from runtime.profiles import check_profile, default_profile
from runtime.targets import TENSORRT_RTX, Target
from runtime.tensorrt.driver import compute_capability_here
from runtime.tensorrt.library import PACKAGES, load_library
from runtime.tensorrt.plan_header import plan_capabilities
from runtime.tensorrt.process import build_in_fresh_process
from runtime.tensorrt.request import BuildRequest, NetworkFacts
from runtime.tensorrt.session import EngineSession, require_gpu

LOG_FILE = "build.log"


@dataclasses.dataclass(frozen=True)
class TensorRTBackend:
    """``name`` is ``tensorrt`` or ``tensorrt-rtx``."""

    name: str

    def why_not(self, model_dir: Path, target: Target) -> list[str]:
        """Reasons why this model cannot be built for ``target`` here; empty: it can."""
        return [*self._why_not_here(target), *why_not_buildable(model_dir, target)]

    def _why_not_here(self, target: Target) -> list[str]:
        try:
            load_library(self.name)
        except UserError as missing:
            return [f"{missing.what} ({missing.hint})"]
        if self.name == TENSORRT_RTX:
            return []
        found = compute_capability_here()
        if found == target.compute_capability:
            return []
        here = "there is no GPU here" if found is None else f"the GPU here has {found}"
        return [
            f"TensorRT builds {target.name} on the device itself (compute capability {target.compute_capability}), "
            f"and {here}"
        ]

    def build(self, model_dir: Path, target: Target, options: BuildOptions, out_dir: Path) -> Manifest:
        """Write model.engine, build.log and what goes with the model.

        When TensorRT fails, the log stays at ``<out_dir>.build.log``.

        Raises:
            UserError: the profile does not fit, the model is damaged, TensorRT refuses it or crashes, or ``out_dir``
                exists.
        """
        inputs = Manifest.load(model_dir).inputs
        profile = default_profile(inputs) if options.profile is None else options.profile
        check_profile(profile, inputs)
        onnx = model_file(model_dir)
        tensors = check_external_data(onnx)
        assert target.compute_capability is not None, f"{target.name} has a GPU"
        with new_directory(out_dir) as staging:
            request = BuildRequest(
                backend=self.name,
                onnx=onnx.resolve(),
                engine=(staging / ENGINE_FILE).resolve(),
                compute_capability=target.compute_capability,
                profile=profile,
                workspace_bytes=options.workspace_bytes,
                optimization_level=options.optimization_level,
            )
            with _log_kept_on_failure(staging / LOG_FILE, out_dir.with_name(f"{out_dir.name}.{LOG_FILE}")) as log:
                facts = build_in_fresh_process(request, log)
            details = _details(request, facts, float_types(tensors))
            return self._finish(model_dir, target, staging, facts, details)

    def _finish(
        self, model_dir: Path, target: Target, staging: Path, facts: NetworkFacts, details: dict[str, object]
    ) -> Manifest:
        if self.name == TENSORRT_RTX:
            found = plan_capabilities(staging / ENGINE_FILE)
            if found != [target.compute_capability]:
                raise UserError(
                    f"TensorRT-RTX built for compute capability {', '.join(found)}, asked for "
                    f"{target.compute_capability}",
                    hint="use the TensorRT-RTX version that pyproject.toml names",
                )
        parent = Manifest.load(model_dir)
        return finish_engine(
            model_dir,
            target,
            staging,
            inputs=_as_built(parent.inputs, facts.inputs, model_dir),
            outputs=_as_built(parent.outputs, facts.outputs, model_dir),
            tools={PACKAGES[self.name]: facts.library},
            details=details,
        )

    def open(self, engine_dir: Path) -> EngineSession:
        """An engine on this machine's GPU.

        Raises:
            UserError: the engine is damaged, of another TensorRT version, or for another GPU; or there is no GPU.
        """
        trt = load_library(self.name)
        manifest = check_engine(engine_dir, self.name, PACKAGES[self.name], trt.__version__)
        require_gpu(manifest, engine_dir)
        return EngineSession(trt, engine_dir / ENGINE_FILE, manifest)


def _details(request: BuildRequest, facts: NetworkFacts, floats: list[str]) -> dict[str, object]:
    return {
        "compute_capability": request.compute_capability,
        "profile": profile_to_json(request.profile),
        "workspace_bytes": request.workspace_bytes,
        "optimization_level": request.optimization_level,
        "float_types": floats,
        "layers": facts.layers,
    }


def _as_built(specs: tuple[TensorSpec, ...], built: dict[str, str], model_dir: Path) -> tuple[TensorSpec, ...]:
    """The model's specs with the types that TensorRT gave them."""
    if [spec.name for spec in specs] != list(built):
        names = ", ".join(spec.name for spec in specs)
        raise UserError(
            f"the manifest of {model_dir} names {names}, its graph {', '.join(built)}",
            hint="make the model directory again",
        )
    return tuple(dataclasses.replace(spec, dtype=built[spec.name]) for spec in specs)


@contextlib.contextmanager
def _log_kept_on_failure(log: Path, kept: Path) -> Iterator[Path]:
    try:
        yield log
    except UserError as failure:
        shutil.copyfile(log, kept)
        raise UserError(failure.what, hint=f"{failure.hint}; TensorRT's log is {kept}") from failure
