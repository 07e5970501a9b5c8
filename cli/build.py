"""Build an engine for a device from a model directory.

Targets of TensorRT-RTX (rtx-ampere, rtx-ada, rtx-blackwell, dgx-spark, sm80) are built on any machine, without a GPU,
and with --also one engine is for several. Targets of TensorRT (a100, h100, b200, jetson-orin, jetson-thor) are built on
the device. onnxruntime-cpu optimises the graph ahead of time. Formats are those of the graph, so there is no --fp16:
`moe-edge optimize --precision fp16`. `moe-edge targets` lists all targets, and says what fits their memory.

Options of TensorRT may be spelt as trtexec does. --minShapes, --optShapes and --maxShapes may be given several times,
for several profiles: one for prompts and one for single tokens, say. A run uses the first that takes its shapes.

Example: moe-edge build optimized/ --target cpu -o engine-cpu/
Example: moe-edge build optimized/ --target rtx-ada -o engine/
Example: moe-edge build optimized/ --target rtx-ada --also rtx-blackwell --optShapes=pixel_values:8x1x28x28 -o both/
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import AsJson, BackendName, MaxShapes, MinShapes, OptShapes, Output

if TYPE_CHECKING:
    from moe_spec.manifest import Manifest
    from runtime.profiles import Profile


def build(
    model: Annotated[Path, typer.Argument(help="Model directory that optimize wrote for the target, or export.")],
    output: Output,
    target: Annotated[
        str, typer.Option(metavar="NAME", help="Device to build for: a name (rtx-ada) or a compute capability (sm89).")
    ],
    backend: BackendName = None,
    also: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="TensorRT-RTX: a further target of the same engine.")
    ] = None,
    profile: Annotated[
        list[int] | None,
        typer.Option(help="Number of the profile that the shapes that follow are of, as trtexec has it."),
    ] = None,
    min_shapes: MinShapes = None,
    opt_shapes: OptShapes = None,
    max_shapes: MaxShapes = None,
    workspace: Annotated[
        int | None,
        typer.Option(min=1, help="MiB of scratch memory that a kernel may use; by default TensorRT's own limit."),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            "--optimization-level",
            "--builderOptimizationLevel",
            min=0,
            max=5,
            help="0 builds quickly, 5 runs fast; by default TensorRT's own.",
        ),
    ] = None,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", "--allowWeightStreaming", help="Let weights stay in the host's memory."),
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            "--timingCacheFile",
            help="TensorRT: file of kernels that were timed before; made if missing.",
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", "--versionCompatible", help="TensorRT: newer versions may run the engine."
        ),
    ] = False,
    hardware_compatibility: Annotated[
        str | None,
        typer.Option(
            "--hardware-compatibility",
            "--hardwareCompatibilityLevel",
            metavar="NAME",
            help="TensorRT: other GPUs may run the engine, ampere+ or sameComputeCapability; none by default.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an engine directory."""
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
    """Ranges of the inputs; those of a cache, two a layer, once where they are the same."""
    from moe_spec.decoder import PAST
    from runtime.profiles import dims

    ranges = (
        f"{PAST + '*' if name.startswith(PAST) else name} {dims(shapes.min)} to {dims(shapes.max)}"
        for name, shapes in sorted(profile.items())
    )
    return ", ".join(dict.fromkeys(ranges))
