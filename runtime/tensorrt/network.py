"""ONNX to a strongly typed TensorRT network to a serialised engine. Knows the library, and no files but the model's."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from moe_spec.errors import UserError
from moe_spec.files import new_file
from runtime.backend import AMPERE_PLUS, SAME_CAPABILITY
from runtime.profiles import Profile
from runtime.tensorrt.failures import build_error, parse_error
from runtime.tensorrt.listeners import make_logger, make_monitor, make_writer
from runtime.tensorrt.request import BuildRequest, NetworkFacts, Step

_NUMPY = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8e4m3fn", "FP4": "float4e2m1",
    "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "INT4": "int4", "BOOL": "bool",
}  # fmt: skip
_LEVELS = {AMPERE_PLUS: "AMPERE_PLUS", SAME_CAPABILITY: "SAME_COMPUTE_CAPABILITY"}


def build_engine(trt: Any, request: BuildRequest, log: TextIO, tell: Callable[[Step], None]) -> NetworkFacts:
    """Write the engine; what its network held.

    Raises:
        OSError: the disk cannot hold the engine.
        UserError: the library lacks what is asked for; or the parser or the builder refuses the model, and the message
            names the node where TensorRT does.
    """
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    # TensorRT 11 and RTX know no other networks; 10.x has to be told
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.onnx)):
        raise parse_error(parser, request, logger.errors)
    config = configure(trt, builder, request)
    config.progress_monitor = make_monitor(trt, tell)
    with request.engine.open("wb") as file:
        if not write_plan(trt, builder, network, config, file):
            raise build_error(request, logger.errors)
    if request.timing_cache is not None:
        keep_timings(config, request.timing_cache)
    return _facts(trt, network, logger.memory)


def write_plan(trt: Any, builder: Any, network: Any, config: Any, file: BinaryIO) -> bool:
    """Build, and write the plan; whether it was built.

    The library writes it as it comes, where it can: with 403 MB of weights TensorRT-RTX 1.7 then took 1.0 GB, not 1.3.
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            file.write(plan)
        return plan is not None
    writer = make_writer(trt, file)
    done: bool = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.failure is not None:
        raise writer.failure
    return done


def configure(trt: Any, builder: Any, request: BuildRequest) -> Any:
    """A configuration with all that ``request`` asks for.

    Raises:
        UserError: this version of the library has no such capability, level or flag.
    """
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: float32 would have 10 bits of mantissa in products
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    for profile in request.profiles:
        if profile:
            config.add_optimization_profile(_profile(builder, profile))
    if request.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.hardware_compatibility is not None:
        level = _LEVELS[request.hardware_compatibility]
        config.hardware_compatibility_level = _known(trt, trt.HardwareCompatibilityLevel, level, request)
    if request.timing_cache is not None:
        _take_timings(config, request.timing_cache)
    if hasattr(trt, "ComputeCapability"):
        _choose_gpus(trt, config, request)
    return config


def _choose_gpus(trt: Any, config: Any, request: BuildRequest) -> None:
    """Left alone, TensorRT-RTX drops GPUs that lack a number format without a word."""
    config.num_compute_capabilities = len(request.compute_capabilities)
    for index, capability in enumerate(request.compute_capabilities):
        known = _known(trt, trt.ComputeCapability, "SM" + capability.replace(".", ""), request)
        config.set_compute_capability(known, index)


def _known(trt: Any, members: Any, name: str, request: BuildRequest) -> Any:
    found = getattr(members, name, None)
    if found is None:
        raise UserError(
            f"{request.backend} {trt.__version__} knows no {members.__name__} {name}",
            hint=f"update {request.backend}, or choose another",
        )
    return found


def _take_timings(config: Any, path: Path) -> None:
    """Start from the timing cache, or from an empty one where it was made by another version or GPU."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep_timings(config: Any, path: Path) -> None:
    """Write the timing cache with what this build measured."""
    cache = config.get_timing_cache()
    with new_file(path) as staging:
        staging.write_bytes(cache.serialize())


def _profile(builder: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, shape.min, shape.opt, shape.max)
    return profile


def _facts(trt: Any, network: Any, memory: dict[str, int]) -> NetworkFacts:
    def dtype(tensor_type: Any) -> str:
        return _NUMPY.get(tensor_type.name, str(tensor_type.name))

    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return NetworkFacts(
        library=trt.__version__,
        inputs={tensor.name: dtype(tensor.dtype) for tensor in inputs},
        outputs={tensor.name: dtype(tensor.dtype) for tensor in outputs},
        layers=dict(Counter(f"{layer.type.name} {dtype(layer.get_output_type(0))}" for layer in layers)),
        memory=memory,
    )
