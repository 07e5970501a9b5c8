"""Run a model or an engine over .npz and image files.

A classifier (config.json with id2label) names the class of every example; other models need -o for their outputs.

Example: moe-edge run optimized/ --input boot.png --input more.npz -o predictions.npz
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import AsJson

if TYPE_CHECKING:
    from runtime.run import Predictions

_SHOWN = 20


def run(
    model: Annotated[Path, typer.Argument(help="Engine directory, model directory or .onnx file.")],
    inputs: Annotated[list[Path], typer.Option("--input", help=".npz, PNG or JPEG file; repeatable.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help=".npz; it must not exist yet.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that are run at once.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Run a model or an engine over .npz and image files.

    Example: moe-edge run optimized/ --input boot.png --input more.npz -o predictions.npz
    """
    from runtime.run import run as predict

    with console.status(f"running {model}"):
        predictions = predict(model, inputs, output, batch_size)
    found = _examples(predictions)
    payload = {
        "examples": found,
        "outputs": {name: list(array.shape) for name, array in predictions.outputs.items()},
        "file": None if output is None else str(output),
    }
    console.result("\n".join(_lines(predictions, found, output)), payload, as_json)


def _examples(predictions: "Predictions") -> list[dict[str, Any]]:
    if predictions.classes is None or predictions.probabilities is None:
        return [{"name": name} for name in predictions.names]
    best = predictions.probabilities.max(axis=1)
    return [
        {"name": name, "class": label, "probability": float(probability)}
        for name, label, probability in zip(predictions.names, predictions.classes, best, strict=True)
    ]


def _lines(predictions: "Predictions", examples: list[dict[str, Any]], output: Path | None) -> list[str]:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in predictions.outputs.items())
    where = "" if output is None else f", written to {output}"
    lines = [f"{len(examples)} examples: {shapes}{where}"]
    if predictions.classes is not None:
        lines += [f"  {row['name']}: {row['class']} ({row['probability']:.1%})" for row in examples[:_SHOWN]]
        more = len(examples) - _SHOWN
        lines += [f"  and {more} more (--json shows all)"] if more > 0 else []
    return lines
