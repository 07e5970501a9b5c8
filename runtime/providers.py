"""Execution providers of ONNX Runtime: what they are called, what brings them, and which options they take."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError, did_you_mean

CPU, CUDA, OPENVINO = "cpu", "cuda", "openvino"

_CUDA_OPTIONS = (
    "device_id", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace",
    "cudnn_conv1d_pad_to_nc1d", "do_copy_in_default_stream", "enable_cuda_graph", "enable_skip_layer_norm_strict_mode",
    "fuse_conv_bias", "prefer_nhwc", "sdpa_kernel", "tunable_op_enable", "tunable_op_tuning_enable",
    "tunable_op_max_tuning_duration_ms", "use_ep_level_unified_stream", "use_tf32",
)  # fmt: skip
_TENSORRT_OPTIONS = (
    "device_id", "trt_auxiliary_streams", "trt_bf16_enable", "trt_build_heuristics_enable",
    "trt_builder_optimization_level", "trt_context_memory_sharing_enable", "trt_cuda_graph_enable",
    "trt_detailed_build_log", "trt_dla_core", "trt_dla_enable", "trt_engine_cache_enable", "trt_engine_cache_path",
    "trt_engine_cache_prefix", "trt_engine_hw_compatible", "trt_extra_plugin_lib_paths",
    "trt_force_sequential_engine_build", "trt_force_timing_cache", "trt_fp16_enable", "trt_int8_enable",
    "trt_int8_calibration_table_name", "trt_int8_use_native_calibration_table", "trt_layer_norm_fp32_fallback",
    "trt_max_partition_iterations", "trt_max_workspace_size", "trt_min_subgraph_size", "trt_op_types_to_exclude",
    "trt_profile_max_shapes", "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_sparsity_enable",
    "trt_tactic_sources", "trt_timing_cache_enable", "trt_timing_cache_path", "trt_weight_stripped_engine_enable",
)  # fmt: skip
_TENSORRT_RTX_OPTIONS = (
    "device_id", "enable_cuda_graph", "nv_detailed_build_log", "nv_max_shared_mem_size", "nv_max_workspace_size",
    "nv_multi_profile_enable", "nv_profile_max_shapes", "nv_profile_min_shapes", "nv_profile_opt_shapes",
    "nv_runtime_cache_path", "nv_weight_streaming_budget",
)  # fmt: skip
_OPENVINO_OPTIONS = (
    "device_type", "disable_dynamic_shapes", "enable_causallm", "layout", "load_config", "reshape_input"
)  # fmt: skip
_QNN_OPTIONS = (
    "device_type", "backend_path", "backend_type", "device_id", "enable_htp_fp16_precision",
    "enable_htp_shared_memory_allocator", "enable_htp_spill_fill_buffer", "enable_vtcm_backup_buffer_sharing",
    "extended_udma", "htp_arch", "htp_bf16_enable", "htp_graph_finalization_optimization_mode", "htp_performance_mode",
    "offload_graph_io_quantization", "op_packages", "profiling_file_path", "profiling_level", "qnn_context_priority",
    "qnn_saver_path", "rpc_control_latency", "skip_qnn_version_check", "soc_model", "vtcm_mb",
)  # fmt: skip
_COREML_OPTIONS = (
    "AllowLowPrecisionAccumulationOnGPU", "EnableOnSubgraphs", "MLComputeUnits", "ModelCacheDirectory", "ModelFormat",
    "ProfileComputePlan", "RequireStaticInputShapes", "SpecializationStrategy",
)  # fmt: skip


Defaults = Callable[[int, Path | None], Mapping[str, str]]
"""Options of a provider where nobody asks for others, by how many threads it may use (0: one a core) and where it may
keep what it compiles: its numbers are those of the graph, as number formats are a matter of graphs here."""


def _openvino(threads: int, cache: Path | None) -> dict[str, str]:
    """By default OpenVINO computes in bfloat16 where the CPU has it: 1 % off what the graph says."""
    of_all: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY"} | ({} if cache is None else {"CACHE_DIR": str(cache)})
    of_cpu = of_all | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    return {"load_config": json.dumps({"CPU": of_cpu, "GPU": of_all, "NPU": of_all})}


def _cuda(_threads: int, _cache: Path | None) -> dict[str, str]:
    """By default products in float32 are computed in TF32, which has 10 bits of mantissa."""
    return {"use_tf32": "0"}


def _tensorrt(_threads: int, cache: Path | None) -> dict[str, str]:
    """Neither it nor TensorRT-RTX has an option against TF32: see docs/howto/run-on-a-gpu-or-npu.md."""
    if cache is None:
        return {}
    paths = dict.fromkeys(("trt_engine_cache_path", "trt_timing_cache_path"), str(cache))
    return {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1", **paths}


def _qnn(_threads: int, _cache: Path | None) -> dict[str, str]:
    """By default the NPU computes graphs of float32 in float16."""
    return {"enable_htp_fp16_precision": "0"}


def _coreml(_threads: int, cache: Path | None) -> dict[str, str]:
    """By default Core ML is given a neural network, whose formats it chooses; those of an ML program are the graph's.

    https://apple.github.io/coremltools/docs-guides/source/typed-execution.html
    """
    return {"ModelFormat": "MLProgram"} | ({} if cache is None else {"ModelCacheDirectory": str(cache)})


def _in(option: str) -> Defaults:
    """Of a provider that has one option for its cache."""
    return lambda _threads, cache: {} if cache is None else {option: str(cache)}


@dataclasses.dataclass(frozen=True)
class Provider:
    """A row of `PROVIDERS`.

    Attributes:
        name: as given to ``--provider``.
        official: ONNX Runtime's name of it.
        package: what `pip install` brings it with.
        plugin: module of the package where that goes beside any onnxruntime; None where the package is an onnxruntime.
        needs: what has to be on the machine besides.
        options: that it takes. Some providers ignore what they do not know, so nothing else is handed to them.
        defaults: options that it is given besides.
        memory: where its tensors lie, as ONNX Runtime calls devices.
        writes_graph: whether ONNX Runtime can write a graph as it optimises it for this provider: not where that
            compiles the graph.
        sizes_on_cpu: whether ONNX Runtime keeps what computes sizes on the CPU, though the provider has kernels for it.
    """

    name: str
    official: str
    package: str
    plugin: str | None
    needs: str
    options: tuple[str, ...] = ()
    defaults: Defaults = lambda _threads, _cache: {}
    memory: str = CPU
    writes_graph: bool = False
    sizes_on_cpu: bool = False


PROVIDERS: tuple[Provider, ...] = (
    Provider(CPU, "CPUExecutionProvider", "onnxruntime", None, "any CPU", writes_graph=True),
    Provider(
        CUDA, "CUDAExecutionProvider", "'onnxruntime-gpu[cuda,cudnn]'", None,
        "an NVIDIA GPU with its driver, CUDA, cuDNN", _CUDA_OPTIONS, _cuda, memory="cuda", writes_graph=True,
        sizes_on_cpu=True,
    ),
    Provider(
        "tensorrt", "TensorrtExecutionProvider", "'onnxruntime-gpu[cuda,cudnn]' tensorrt", None,
        "an NVIDIA GPU with its driver, CUDA, cuDNN, TensorRT", _TENSORRT_OPTIONS,
        _tensorrt,
        memory="cuda",
    ),
    Provider(
        "tensorrt-rtx", "NvTensorRTRTXExecutionProvider", "onnxruntime-ep-nv-tensorrt-rtx",
        "onnxruntime_ep_nv_tensorrt_rtx", "an RTX GPU with its driver", _TENSORRT_RTX_OPTIONS,
        _in("nv_runtime_cache_path"), memory="cuda",
    ),
    Provider(
        OPENVINO, "OpenVINOExecutionProvider", "onnxruntime-ep-openvino", "onnxruntime_ep_openvino",
        "an Intel CPU, GPU or NPU", _OPENVINO_OPTIONS, _openvino,
    ),
    Provider(
        "qnn", "QNNExecutionProvider", "onnxruntime-qnn", "onnxruntime_qnn", "a Qualcomm SoC", _QNN_OPTIONS, _qnn,
    ),
    Provider(
        "coreml", "CoreMLExecutionProvider", "onnxruntime", None, "macOS", _COREML_OPTIONS, _coreml,
    ),
    Provider("directml", "DmlExecutionProvider", "onnxruntime-directml", None, "Windows", ("device_id",), memory="dml"),
)  # fmt: skip
"""Sources: https://onnxruntime.ai/docs/execution-providers, and the names that are in the libraries themselves."""


def find_provider(name: str) -> Provider:
    """The provider called ``name``, by us or by ONNX Runtime.

    >>> find_provider("cuda").official, find_provider("QNNExecutionProvider").name
    ('CUDAExecutionProvider', 'qnn')

    Raises:
        UserError: there is none; the hint names the closest.
    """
    found = next((row for row in PROVIDERS if name in (row.name, row.official)), None)
    if found is None:
        raise UserError(f"{name!r} is no execution provider", hint=did_you_mean(name, [row.name for row in PROVIDERS]))
    return found
