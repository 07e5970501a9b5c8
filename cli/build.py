"""Build an engine for a device from a model directory.

TensorRT-RTX engines (rtx-ampere, rtx-ada, rtx-blackwell, dgx-spark, sm80) are built here, without a GPU; with --also
one engine runs on several. TensorRT engines (a100, h100, b200, jetson-orin, jetson-thor) are built on the device.
onnxruntime-cpu optimises the graph ahead of time, onnxruntime-cuda does so on the device; other providers of ONNX
Runtime compile a model when it is opened (`moe-edge run --provider openvino --cache DIR`). `moe-edge targets` lists
them all, and says what fits their memory.

Shapes are given as to trtexec, and so may these options be: --timingCacheFile, --builderOptimizationLevel,
--allowWeightStreaming, --versionCompatible, --hardwareCompatibilityLevel. --minShapes, --optShapes and --maxShapes may
be given several times, once for each profile: one for prompts and one for single tokens, say. At each run the first
that takes the shapes is used.

Example: moe-edge build optimized/ -o engine/ --target rtx-ada
Example: moe-edge build optimized/ -o engine/ --target rtx-ada --also rtx-blackwell --optShapes=x:1x8 --optShapes=x:64x8
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import AsJson, MaxShapes, MinShapes, OptShapes, Output

if TYPE_CHECKING:
    from moe_spec.manifest import Manifest
    from runtime.profiles import Profile


def build(
    model: Annotated[Path, typer.Argument(help="Model directory that `export` or `optimize` wrote.")],
    output: Output,
    target: Annotated[str, typer.Option(help="Device to build for, e.g. rtx-ada or sm89.")],
    backend: Annotated[str | None, typer.Option(help="Choose among targets of one name, e.g. sm80.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="TensorRT-RTX: further targets of the same engine.")] = None,
    profile: Annotated[list[int] | None, typer.Option(help="Numbers of the profiles, as trtexec has them.")] = None,
    min_shapes: MinShapes = None,
    opt_shapes: OptShapes = None,
    max_shapes: MaxShapes = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="MiB of scratch memory a kernel may use.")] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            "--optimization-level", "--builderOptimizationLevel", min=0, max=5, help="0 builds quickly, 5 runs fast."
        ),
    ] = None,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", "--allowWeightStreaming", help="Weights may stay in the host's memory."),
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", "--timingCacheFile", help="TensorRT: kernels measured before; made if missing."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", "--versionCompatible", help="TensorRT: newer versions may run it.")
    ] = False,
    hardware_compatibility: Annotated[
        str | None,
        typer.Option(
            "--hardware-compatibility",
            "--hardwareCompatibilityLevel",
            help="TensorRT: ampere+ or sameComputeCapability, which other GPUs may run it.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build an engine for a device from a model directory.

    Example: moe-edge build optimized/ -o engine/ --target rtx-ada
    """
    from runtime.backend import BuildOptions
    from runtime.build import build as build_engine
    from runtime.profiles import parse_profiles
    from runtime.targets import find_target

    device = find_target(target, backend)
    options = BuildOptions(
        profiles=parse_profiles(min_shapes or [], opt_shapes or [], max_shapes or [], profile or []),
        workspace_bytes=None if workspace is None else workspace << 20,
        optimization_level=optimization_level,
        weight_streaming=weight_streaming,
        also=tuple(find_target(name, device.backend) for name in also or []),
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
    )
    with console.progress(f"building {output} for {device.name}") as tell:
        manifest = build_engine(model, device, options, output, tell)
    names = ", ".join(row.name for row in (device, *options.also))
    summary = f"{output}: {names}, {_about(output, manifest, not options.profiles)}"
    console.result(summary, manifest.to_json(), as_json)


def _about(output: Path, manifest: "Manifest", default: bool) -> str:
    """How large an engine is, what it keeps in memory, what shapes it takes, and whether anybody chose them."""
    from runtime.engine import profiles_of
    from runtime.model_dir import model_bytes

    size = f"{model_bytes(output):,} bytes"
    memory = manifest.details.get("memory", {})
    if "activations" in memory:
        size += f" and {memory['activations']:,} of activations"
    profiles = [_shown(profile) for profile in profiles_of(manifest) if profile]
    if not profiles:
        return size
    hint = " (default; choose with --minShapes --optShapes --maxShapes)" if default else ""
    return f"{size}, takes {' or '.join(profiles)}{hint}"


def _shown(profile: "Profile") -> str:
    from runtime.profiles import dims

    ranges = sorted(profile.items())
    return ", ".join(f"{name} {dims(shapes.min)} to {dims(shapes.max)}" for name, shapes in ranges)
