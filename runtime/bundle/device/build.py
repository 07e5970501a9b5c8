"""Build on this device, without trtexec: ``python3 build.py``.

out/engine.plan is the engine to run. out/observed.plan is for verify.py alone: the same model, with what its routers
do as outputs, so that flips can be told from faults.

Needs Python 3.8 or newer and TensorRT's Python package, which JetPack brings along; nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def build(trt: Any, onnx: Path, details: dict[str, Any], workspace: int | None) -> Any:
    """The engine's bytes; None with TensorRT's messages on stderr where it refuses the model."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        for index in range(parser.num_errors):
            print(parser.get_error(index), file=sys.stderr)
        return None
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: golden outputs are compared to its tolerance
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    for shapes in details["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape["min"], shape["opt"], shape["max"])
        config.add_optimization_profile(profile)
    if hasattr(trt, "ComputeCapability"):  # TensorRT-RTX, which builds without the GPU
        config.num_compute_capabilities = 1
        config.set_compute_capability(
            getattr(trt.ComputeCapability, "SM" + details["compute_capability"].replace(".", "")), 0
        )
    return builder.build_serialized_network(network, config)


def save(plan: Any, path: Path) -> int:
    """Write an engine; its size in bytes."""
    path.parent.mkdir(exist_ok=True)
    staging = path.with_name(path.name + ".part")
    staging.write_bytes(memoryview(plan))
    size = staging.stat().st_size
    staging.replace(path)
    return size


def main(arguments: list[str] | None = None) -> int:
    """Read the command line."""
    line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("--workspace", type=int, help="MiB of scratch memory a kernel may use")
    options = line.parse_args(arguments)
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    details = manifest["details"]
    try:
        trt = importlib.import_module(details["package"])
    except ImportError as missing:
        print(f"error: {missing}\nhint: install {details['package']} {details['versions']}", file=sys.stderr)
        return 1
    engines = [("model.onnx", "engine.plan")]
    if any(block["gates"] is not None for block in manifest["blocks"]):
        engines.append(("observed.onnx", "observed.plan"))
    for graph, engine in engines:
        plan = build(trt, HERE / "model" / graph, details, options.workspace)
        if plan is None:
            print(f"error: {details['package']} {trt.__version__} builds no {engine}, see above", file=sys.stderr)
            return 1
        size = save(plan, HERE / "out" / engine)
        print(f"{HERE / 'out' / engine}: {size:,} bytes, {details['package']} {trt.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
