"""TensorRT and TensorRT-RTX as a backend.

Executed by the tests: builds with TensorRT-RTX, which need no GPU. ``tensorrt`` takes the same path, but builds on the
device only; every name that is used of it is checked against the published bindings of 10.x and 11.x.
"""

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moe_spec.errors import UserError, require_known
from moe_spec.files import new_directory
from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.progress import Progress, silent
from runtime.backend import AMPERE_PLUS, ENGINE_FILE, SAME_CAPABILITY, BuildOptions
from runtime.engine import check_engine, finish_engine
from runtime.model_dir import model_file, why_not_buildable
from runtime.onnx_file import check_external_data, number_formats
from runtime.profiles import check_profile, default_profile, profile_to_json
from runtime.targets import TENSORRT, TENSORRT_RTX, Target, version_fits
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
        return [*self.why_not_here(target), *why_not_buildable(model_dir, target)]

    def why_not_here(self, target: Target) -> list[str]:
        """Reasons why nothing can be built for ``target`` on this machine."""
        if target.backend != self.name:
            return [f"{target.name} is a target of {target.backend}, not of {self.name}"]
        try:
            version = load_library(self.name).__version__
        except UserError as missing:
            return [f"{missing.what} ({missing.hint})"]
        if not version_fits(version, target.versions):
            return [f"{target.name} takes {self.name} {target.versions}, here is {version}"]
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

    def build(
        self,
        model_dir: Path,
        target: Target,
        options: BuildOptions,
        out_dir: Path,
        on_progress: Progress = silent,
    ) -> Manifest:
        """Write model.engine, build.log and what goes with the model.

        When TensorRT fails, the log stays at ``<out_dir>.build.log``.

        Raises:
            UserError: an option that this library has not, a profile that does not fit, a damaged model, TensorRT
                refuses it or crashes, or ``out_dir`` exists.
        """
        _check_options(options, self.name)
        inputs = Manifest.load(model_dir).inputs
        options = dataclasses.replace(options, profiles=options.profiles or (default_profile(inputs),))
        for profile in options.profiles:
            check_profile(profile, inputs)
        onnx = model_file(model_dir)
        tensors = check_external_data(onnx)
        with new_directory(out_dir) as staging:
            request = self._request(onnx, target, options, staging)
            with _log_kept_on_failure(staging / LOG_FILE, out_dir.with_name(f"{out_dir.name}.{LOG_FILE}")) as log:
                facts = build_in_fresh_process(request, log, on_progress)
            details = _details(request, facts, options, number_formats(tensors))
            return self._finish(model_dir, target, request, facts, details)

    def _request(self, onnx: Path, target: Target, options: BuildOptions, staging: Path) -> BuildRequest:
        capabilities = dict.fromkeys(row.compute_capability for row in (target, *options.also))
        return BuildRequest(
            backend=self.name,
            target=target.name,
            onnx=onnx.resolve(),
            engine=(staging / ENGINE_FILE).resolve(),
            compute_capabilities=tuple(capability for capability in capabilities if capability is not None),
            profiles=options.profiles,
            workspace_bytes=options.workspace_bytes,
            optimization_level=options.optimization_level,
            weight_streaming=options.weight_streaming,
            timing_cache=None if options.timing_cache is None else options.timing_cache.resolve(),
            version_compatible=options.version_compatible,
            hardware_compatibility=options.hardware_compatibility,
        )

    def _finish(
        self, model_dir: Path, target: Target, request: BuildRequest, facts: NetworkFacts, details: dict[str, object]
    ) -> Manifest:
        if self.name == TENSORRT_RTX:
            found = plan_capabilities(request.engine)
            if set(found) != set(request.compute_capabilities):
                raise UserError(
                    f"TensorRT-RTX built for compute capability {', '.join(found)}, asked for "
                    f"{', '.join(request.compute_capabilities)}",
                    hint="use the TensorRT-RTX version that pyproject.toml names",
                )
        parent = Manifest.load(model_dir)
        return finish_engine(
            model_dir,
            target,
            request.engine.parent,
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


def _check_options(options: BuildOptions, backend: str) -> None:
    """Refuse what only the other library has.

    Raises:
        UserError: one of TensorRT's options for TensorRT-RTX, or the other way round; or an unknown level.
    """
    if options.hardware_compatibility is not None:
        levels = (AMPERE_PLUS, SAME_CAPABILITY)
        require_known(options.hardware_compatibility, "level of --hardware-compatibility", levels)
    of_the_other = {
        TENSORRT_RTX: BuildOptions(
            timing_cache=options.timing_cache,
            version_compatible=options.version_compatible,
            hardware_compatibility=options.hardware_compatibility,
        ),
        TENSORRT: BuildOptions(also=options.also),
    }[backend]
    if of_the_other != BuildOptions():
        raise UserError(
            f"{backend} has no {' '.join(of_the_other.arguments())}", hint="leave it out, or give another --target"
        )


def _details(
    request: BuildRequest, facts: NetworkFacts, options: BuildOptions, formats: list[str]
) -> dict[str, object]:
    by_format: Counter[str] = Counter()
    for layer, count in facts.layers.items():
        by_format[layer.rpartition(" ")[2]] += count
    return {
        "compute_capabilities": list(request.compute_capabilities),
        "profiles": [profile_to_json(profile) for profile in request.profiles],
        "workspace_bytes": request.workspace_bytes,
        "optimization_level": request.optimization_level,
        "weight_streaming": request.weight_streaming,
        "version_compatible": request.version_compatible,
        "hardware_compatibility": request.hardware_compatibility,
        "arguments": options.arguments(),
        "number_formats": formats,
        "layers": facts.layers,
        "formats": dict(by_format),
        "memory": facts.memory,
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
