"""ONNX to a strongly typed TensorRT network to a serialised engine. Knows the library, no files but the model's."""

import re
from collections import Counter
from typing import Any, TextIO

from moe_spec.errors import UserError
from runtime.profiles import Profile
from runtime.tensorrt.request import BuildRequest, NetworkFacts

_NUMPY = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8e4m3fn", "FP4": "float4e2m1",
    "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "INT4": "int4", "BOOL": "bool",
}  # fmt: skip
_NO_DRIVER = "cudaError 35"  # said whenever something else fails on a machine without a GPU
_NO_PLUGIN = "Plugin not found"
_NOISE = re.compile(r"^\S+: Error Code \d+: |^\S+\.cpp:\d+: |Assertion failed: | ?In \w+ at \S+\.cpp:\d+")


def build_engine(trt: Any, request: BuildRequest, log: TextIO) -> tuple[Any, NetworkFacts]:
    """The engine's bytes (a buffer) and what its network held.

    Raises:
        UserError: the parser or the builder refuses the model; the message names the node where TensorRT does.
    """
    logger = _make_logger(trt, log)
    builder = trt.Builder(logger)
    # TensorRT 11 and RTX know no other networks; 10.x has to be told
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.onnx)):
        raise _parse_error(parser, request, logger.errors)
    config = _configure(trt, builder, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(
            f"{request.backend} cannot build {request.onnx.name} for compute capability {request.compute_capability}: "
            f"{_tidy(logger.errors)}",
            hint="run `moe-edge optimize` with this --target, or choose another target",
        )
    return plan, _facts(trt, network)


def _make_logger(trt: Any, log: TextIO) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known once it is imported
        """Writes to the build log, and keeps what went wrong."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.Severity.VERBOSE:
                return
            log.write(f"[{severity.name}] {message}\n")
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                log.flush()
                self.errors.append(message)

    return Logger()


def _configure(trt: Any, builder: Any, request: BuildRequest) -> Any:
    config = builder.create_builder_config()
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.profile:
        config.add_optimization_profile(_profile(builder, request.profile))
    if hasattr(trt, "ComputeCapability"):  # RTX: left alone, it drops GPUs that lack a number format without a word
        capability = getattr(trt.ComputeCapability, "SM" + request.compute_capability.replace(".", ""), None)
        if capability is None:
            raise UserError(
                f"this {request.backend} knows no compute capability {request.compute_capability}",
                hint="update tensorrt-rtx, or choose another target",
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    return config


def _profile(builder: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, shape.min, shape.opt, shape.max)
    return profile


def _facts(trt: Any, network: Any) -> NetworkFacts:
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
    )


def _parse_error(parser: Any, request: BuildRequest, logged: list[str]) -> UserError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    at_nodes = [error for error in errors if error.node_operator()]
    if not at_nodes:
        reason = _tidy(logged or [error.desc() for error in errors])
        return UserError(
            f"{request.backend} cannot read {request.onnx.name}: {reason}", hint="export or optimize the model again"
        )
    listing = "; ".join(
        f"node {error.node_name() or error.node()!r} ({error.node_operator()}): "
        + ("it knows no such operator" if _NO_PLUGIN in error.desc() else _tidy([error.desc()]))
        for error in at_nodes
    )
    return UserError(
        f"{request.backend} cannot take {request.onnx.name}: {listing}",
        hint="write a form that the target takes: moe-edge optimize MODEL -o OUT --target TARGET",
    )


def _tidy(messages: list[str]) -> str:
    """What TensorRT said first, without its source locations.

    >>> _tidy(["IBuilder::build: Error Code 1: Myelin (No GEMM. In compileGraph at /_src/codeGenerator.cpp:2012)"])
    'Myelin (No GEMM.)'
    """
    found = next((message for message in messages if _NO_DRIVER not in message), "no reason was given, see the log")
    return " ".join(_NOISE.sub("", found).split())
