"""Pack all that a device needs to build a model's engine and to check it by itself.

The directory has the model, golden inputs and outputs (what the routers do, too), tolerances, hashes of every file,
build.sh for trtexec and build.py for TensorRT's Python package, and verify.py, which needs Python 3.8 and numpy. Copy
it to the device and follow its README. Here it is checked with `python3 verify.py --backend onnxruntime`.

Golden outputs are ONNX Runtime's on this CPU, of the first examples of --data. Shapes of the engine are given as to
build.

Example: moe-edge bundle optimized/ --target jetson-orin --data test.npz -o bundle/
Example: moe-edge bundle optimized/ --target jetson-orin --batch-size 2 --optShapes=pixel_values:2x1x28x28 -o two/
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, BackendName, JudgedBy, MaxShapes, MinShapes, OptShapes, Output


def bundle(
    model: Annotated[Path, typer.Argument(help="Model directory that optimize wrote for the target.")],
    output: Output,
    target: Annotated[str, typer.Option(metavar="NAME", help="Device that the bundle is for, see moe-edge targets.")],
    backend: BackendName = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npz whose first examples become golden cases; random inputs at three shapes without it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a golden case of --data.")] = 8,
    min_shapes: MinShapes = None,
    opt_shapes: OptShapes = None,
    max_shapes: MaxShapes = None,
    precision: JudgedBy = None,
    as_json: AsJson = False,
) -> None:
    """Write a bundle's directory."""
    from moe_spec.dataset import load_dataset
    from runtime.bundle.bundle import bundle as write_bundle
    from runtime.profiles import parse_profiles
    from runtime.targets import find_target

    device = find_target(target, backend)
    with console.progress(f"opening {model}") as tell:
        manifest = write_bundle(
            model,
            device,
            output,
            None if data is None else load_dataset(data, model),
            batch_size=batch_size,
            profiles=parse_profiles(min_shapes or [], opt_shapes or [], max_shapes or []),
            precision=precision,
            on_progress=tell,
        )
    size = sum(entry.bytes for entry in manifest.files)
    cases = len(manifest.details["golden"])
    golden = f"{cases} golden case{'s' * (cases != 1)}"
    summary = f"{output}: for {device.name}, {size:,} bytes, {golden}; check it: python3 {output}/verify.py"
    console.result(f"{summary} --backend onnxruntime", manifest.to_json(), as_json)
