"""Write a directory with all that a device needs to build a model's engine and to check it by itself.

The model, golden inputs and outputs (what routers do, too), thresholds, build.sh for trtexec and build.py for
TensorRT's Python package, verify.py that needs Python 3.8 and numpy, and hashes of every file. Copy it to the device;
`python3 verify.py --backend onnxruntime` checks it anywhere.

The golden outputs are ONNX Runtime's, on this CPU: of --data's first examples, or of random inputs at three shapes.
Shapes of the engine are given as to trtexec, several times for several profiles.

Example: moe-edge bundle optimized/ --target jetson-orin --data test.npz -o bundle/
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import AsJson, MaxShapes, MinShapes, OptShapes, Output


def bundle(
    model: Annotated[Path, typer.Argument(help="Model directory that `optimize` wrote for the target.")],
    output: Output,
    target: Annotated[str, typer.Option(help="Device that the bundle is for: `moe-edge targets` lists them.")],
    backend: Annotated[str | None, typer.Option(help="Choose among targets of one name, e.g. sm80.")] = None,
    data: Annotated[Path | None, typer.Option(help=".npz whose first examples become golden cases.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a golden case of --data.")] = 8,
    min_shapes: MinShapes = None,
    opt_shapes: OptShapes = None,
    max_shapes: MaxShapes = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Judge as float32, float16, bfloat16, int8, float8e4m3fn, w8a8, float4e2m1, int4."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a directory with all that a device needs to build a model's engine and to check it by itself."""
    from moe_spec.dataset import load_dataset
    from moe_spec.images import ImagePreprocessor
    from runtime.bundle.bundle import bundle as write_bundle
    from runtime.profiles import parse_profiles
    from runtime.targets import find_target

    device = find_target(target, backend)
    with console.progress(f"opening {model}") as tell:
        manifest = write_bundle(
            model,
            device,
            output,
            None if data is None else load_dataset(data, ImagePreprocessor.load(model)),
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
