"""Build an engine for a device from a model directory.

TensorRT-RTX engines (rtx-ampere, rtx-ada, rtx-blackwell, dgx-spark, sm80) are built here, without a GPU. TensorRT
engines (a100, h100, b200, jetson-orin, jetson-thor) are built on the device. onnxruntime-cpu optimises the graph ahead
of time. `moe-edge targets` lists them all, and says what fits their memory.

Example: moe-edge build optimized/ -o engine/ --target rtx-ada
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, Output


def build(
    model: Annotated[Path, typer.Argument(help="Model directory that `export` or `optimize` wrote.")],
    output: Output,
    target: Annotated[str, typer.Option(help="Device to build for, e.g. rtx-ada or sm89.")],
    backend: Annotated[str | None, typer.Option(help="Choose among targets of one name, e.g. sm80.")] = None,
    min_shapes: Annotated[str | None, typer.Option("--minShapes", help="Smallest shapes: NAME:DIMxDIM,...")] = None,
    opt_shapes: Annotated[str | None, typer.Option("--optShapes", help="Shapes to be quick at.")] = None,
    max_shapes: Annotated[str | None, typer.Option("--maxShapes", help="Largest shapes.")] = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="MiB of scratch memory a kernel may use.")] = None,
    optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="0 builds quickly, 5 runs fast.")] = None,
    as_json: AsJson = False,
) -> None:
    """Build an engine for a device from a model directory.

    Example: moe-edge build optimized/ -o engine/ --target rtx-ada
    """
    from runtime.backend import BuildOptions
    from runtime.build import build as build_engine
    from runtime.model_dir import model_bytes
    from runtime.profiles import parse_profile
    from runtime.targets import find_target

    device = find_target(target, backend)
    options = BuildOptions(
        profile=parse_profile(min_shapes, opt_shapes, max_shapes),
        workspace_bytes=None if workspace is None else workspace << 20,
        optimization_level=optimization_level,
    )
    with console.status(f"building {output} for {device.name}"):
        manifest = build_engine(model, device, options, output)
    takes = _shown(manifest.details.get("profile"), options.profile is None)
    summary = f"{output}: {device.name}, {model_bytes(output):,} bytes{takes}"
    console.result(summary, manifest.to_json(), as_json)


def _shown(profile: dict[str, dict[str, list[int]]] | None, default: bool) -> str:
    """What shapes an engine takes, and whether anybody chose them; nothing for backends that take any."""
    if not profile:
        return ""
    ranges = ", ".join(f"{name} {_dims(row['min'])} to {_dims(row['max'])}" for name, row in sorted(profile.items()))
    return f", takes {ranges}" + (" (default; choose with --minShapes --optShapes --maxShapes)" if default else "")


def _dims(shape: list[int]) -> str:
    return "x".join(map(str, shape))
