"""ONNX Runtime itself: the one file that imports it. A session starts with the provider that was asked for, or not."""

import collections
import contextlib
import ctypes
import importlib
import importlib.util
import io
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from onnxruntime.capi.build_and_package_info import package_name

from moe_spec.errors import UserError
from runtime.execution import Execution
from runtime.providers import CPU, PROVIDERS, Provider

LOGGER = logging.getLogger("moe_edge.onnxruntime")

_SILENT = 4
_FLOAT_ACTIVATIONS = "1"
_OWN_ERRORS = (kind for kind in vars(ort_errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
_ERRORS: tuple[type[Exception], ...] = (RuntimeError, *_OWN_ERRORS)
"""ONNX Runtime's errors have no common base; a bound run fails with RuntimeError."""
_DEVICE_TYPE = "device_type"
"""Which of a plugin's devices is meant: ours to read."""
_OF_SIZES = frozenset({
    "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range",
    "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip
"""What sizes are computed with; graphs with dynamic axes always compute some. A provider with ``sizes_on_cpu`` has
kernels of all of these. Where one is on the CPU nonetheless, ONNX Runtime put it there because it reads nothing but
sizes, small constants and the graph's inputs, and a way to the GPU and back takes longer (GetCpuPreferredNodes in its
source, https://github.com/microsoft/onnxruntime/issues/17930): no weights, and nothing that a layer computed. An op
without a kernel, which takes others along, is none of these, and is named. Not seen at work: CUDA never ran here."""
_LET_THEM = (
    "write another form: moe-edge optimize --form dense; or let run, bench or verify leave them there: --cpu-fallback"
)


def version() -> str:
    """Of the ONNX Runtime that is installed."""
    return str(ort.__version__)


def session_options(threads: int, execution: Execution, *, optimize: bool = True) -> Any:
    """For a session that is silent, and exact where weights are quantised.

    Args:
        threads: that one operator may use; 0 for one a core.
        execution: how the model is to run.
        optimize: whether the graph is still to be optimised.
    """
    options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    if execution.parallel > 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        options.inter_op_num_threads = execution.parallel
    spinning = "1" if execution.spinning else "0"
    entries = {
        "session.intra_op.allow_spinning": spinning,
        "session.inter_op.allow_spinning": spinning,
        "session.record_ep_graph_assignment_info": "0" if execution.asked.name == CPU else "1",
        # a graph that dequantises weights asks for a product in float; by default activations become int8 for it
        "session.qdq_matmulnbits_accuracy_level": _FLOAT_ACTIVATIONS,
    }
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return options


def write_optimized(options: Any, path: Path, inline_bytes: int, *, packed: bool) -> None:
    """Let a session with ``options`` write what it makes of its graph.

    Args:
        options: of the session; what depends on this very CPU is left out of the graph.
        path: of the graph.
        inline_bytes: weights of so many bytes and more stand beside it.
        packed: whether weights are written as this CPU's kernels pack them too. Such a file is twice as large, fits
            this kind of CPU only, and is mapped where weights are otherwise copied in memory.
    """
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    entries = {
        "session.optimized_model_external_initializers_file_name": f"{path.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(inline_bytes),
        "session.save_external_prepacked_constant_initializers": "1" if packed else "0",
    }
    for name, value in entries.items():
        options.add_session_config_entry(name, value)


def load(path: Path, options: Any, execution: Execution) -> Any:
    """ONNX Runtime's session of the file ``path``, all of it on the provider asked for.

    ONNX Runtime itself falls back to the CPU with a log line, for the whole graph or for single nodes. Where the latter
    is allowed, a warning says what runs where.

    Raises:
        UserError: the provider is not there, does not start or leaves nodes to the CPU, or the file cannot be loaded.
    """
    provider = execution.asked
    ort.set_default_logger_severity(_SILENT)
    chosen = _choose(provider, options, execution.options)
    with as_user_error(f"{path} cannot be loaded", "copy or export the model again"):
        try:
            session = ort.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
        except RuntimeError as error:  # which is none of its own errors
            raise _not_started(provider, str(error)) from error
    if provider.official not in session.get_providers():
        raise _not_started(provider, "it finds no device that it can use, or refuses an option")
    if provider.name != CPU:  # the last one of all, which leaves nothing to others
        check_placement(path, provider, placement(session), cpu_fallback=execution.cpu_fallback)
    return session


def why_not_here(provider: Provider) -> str | None:
    """What keeps a provider from starting here, as far as that is known without a model; None: nothing."""
    if provider.plugin is None and provider.official not in ort.get_available_providers():
        return _missing(provider).what
    missing = _missing_library(provider)
    return None if missing is None else _not_started(provider, missing).what


def placement(session: Any) -> dict[str, collections.Counter[str]]:
    """Ops by the provider that runs them, by our names of providers; with how many nodes each.

    Constants are folded and ops fused before they are placed, so these are not always those of the file.
    """
    ours = {row.official: row.name for row in PROVIDERS}
    found: dict[str, collections.Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        name = ours.get(part.ep_name, part.ep_name)
        found.setdefault(name, collections.Counter()).update(node.op_type for node in part.get_nodes())
    return found


def check_placement(
    path: Path, provider: Provider, placed: Mapping[str, collections.Counter[str]], *, cpu_fallback: bool
) -> None:
    """Say which nodes of ``path`` do not run on ``provider``; ``placed`` are its ops by provider, with their counts.

    What computes sizes may be on the CPU where ONNX Runtime wants it there.

    Raises:
        UserError: there are some, and ``cpu_fallback`` does not allow it.
    """
    left = placed.get(CPU, collections.Counter())
    if provider.sizes_on_cpu:
        left = collections.Counter({op: count for op, count in left.items() if op not in _OF_SIZES})
    if not left:
        return
    ops = ", ".join(f"{op} {count}" for op, count in sorted(left.items()))
    everything = sum(count for found in placed.values() for count in found.values())
    where = f"{left.total()} of {everything} nodes of {path} run on the CPU, not on {provider.name}: {ops}"
    if not cpu_fallback:
        raise UserError(where, hint=_LET_THEM)
    LOGGER.warning(where)


@contextlib.contextmanager
def as_user_error(what: str, hint: str) -> Iterator[None]:
    """Give errors of ONNX Runtime as `UserError`, with its reason on one line."""
    try:
        yield
    except _ERRORS as error:
        raise UserError(f"{what}: {_reason(str(error))}", hint=hint) from error


def is_not_implemented(error: BaseException | None) -> bool:
    """Whether ONNX Runtime lacks a kernel."""
    return isinstance(error, ort_errors.NotImplemented)


def _choose(provider: Provider, options: Any, given: Mapping[str, str]) -> list[tuple[str, dict[str, str]]] | None:
    """What ONNX Runtime is told of the provider; None for a plugin, whose device is put into ``options``."""
    if provider.plugin is not None and importlib.util.find_spec(provider.plugin) is not None:
        device = _device(provider, given.get(_DEVICE_TYPE))
        options.add_provider_for_devices(
            [device], {name: value for name, value in given.items() if name != _DEVICE_TYPE}
        )
        return None
    if provider.official not in ort.get_available_providers():
        raise _missing(provider)
    if provider.memory == "cuda":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, and so do we
            ort.preload_dlls()
    return [(provider.official, dict(given))]


def _device(provider: Provider, wanted: str | None) -> Any:
    """The first device that a plugin finds, or the first of the type ``wanted``."""
    try:
        plugin = importlib.import_module(str(provider.plugin))
    except Exception as error:  # whatever a package raises that does not fit its libraries
        raise _not_started(provider, f"{provider.plugin} cannot be imported: {error}") from error
    try:
        if not any(device.ep_name == provider.official for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(provider.official, plugin.get_library_path())
    except _ERRORS as error:
        raise _not_started(provider, str(error)) from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider.official]
    types = [device.device.type.name for device in devices]
    if not devices:
        raise _not_started(provider, "it finds no device that it can use")
    if wanted is not None and wanted not in types:
        raise UserError(
            f"{provider.name} finds no device of the type {wanted}, it finds {', '.join(types)}",
            hint=f"--provider-option {_DEVICE_TYPE}={types[0]}",
        )
    return devices[0 if wanted is None else types.index(wanted)]


_SYSTEMS = {"macOS": "Darwin", "Windows": "Windows"}
"""Python's names of what a provider may need."""


def _missing(provider: Provider) -> UserError:
    """Wheels of ONNX Runtime overwrite each other's files, so that two of them can never be installed together."""
    installed, wanted = str(package_name), provider.package.strip("'").partition("[")[0]
    if provider.plugin is not None:
        hint = f"pip install {provider.package}, which goes beside {installed}; it needs {provider.needs}"
    elif _SYSTEMS.get(provider.needs, platform.system()) != platform.system():
        hint = f"it is in {wanted} on {provider.needs} only; `moe-edge doctor` says which providers work here"
    else:
        hint = (
            f"it is in {wanted}, which cannot be installed beside {installed}: pip uninstall {installed}, then pip "
            f"install {provider.package}; it needs {provider.needs}"
        )
    return UserError(f"{installed} {ort.__version__}, which is installed, has no provider {provider.name}", hint=hint)


def _not_started(provider: Provider, said: str) -> UserError:
    return UserError(
        f"ONNX Runtime cannot start {provider.name}: {_missing_library(provider) or _reason(said)}",
        hint=f"it needs {provider.needs}: pip install {provider.package}; or run on the CPU: --provider {CPU}",
    )


def _reason(said: str) -> str:
    """What stands behind ``[ONNXRuntimeError] : 1 : `` in an error of ONNX Runtime, on one line."""
    said = said.removeprefix("Error in execution: ")
    return " ".join((said.partition("] : ")[2].partition(" : ")[2] or said).split())


def _missing_library(provider: Provider) -> str | None:
    """What the system says of the libraries that a provider is linked to; ONNX Runtime says it to its log only."""
    name = f"onnxruntime_providers_{provider.name}"
    name = f"{name}.dll" if sys.platform == "win32" else f"lib{name}.so"
    library = Path(ort_errors.__file__).with_name(name)
    if library.is_file():
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return str(error)
    return None
