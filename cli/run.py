"""Run a model or an engine on files, or let a decoder go on from prompts.

A classifier (config.json with id2label) names the class of every example; of other models -o takes the outputs. An
.npz has one array a model input, or uint8 `images`. A .jsonl file has one example a line, inputs by their names:
{"input_ids": [5, 7, 2]}.

A decoder answers each --prompt, with the likeliest tokens unless generation_config.json or an option says otherwise. A
single answer is shown as it comes. Text needs the tokenizer's files beside the model, and `moe-edge[text]`.

Example: moe-edge run optimized/ --input boot.png --input photographs/
Example: moe-edge run optimized/ --input test.npz -o predictions.npz
Example: moe-edge run decoder/ --prompt "Once upon a time" --max-new-tokens 20 --stop "The end"
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import (
    AsJson,
    Cache,
    CpuFallback,
    Parallel,
    ProviderName,
    ProviderOptions,
    Spinning,
    Threads,
    execution_of,
    written,
)
from moe_spec.errors import UserError
from moe_spec.progress import silent

if TYPE_CHECKING:
    from runtime.execution import Execution
    from runtime.run import Predictions

_SHOWN = 20
_BATCH = 32


def run(
    model: Annotated[Path, typer.Argument(help="Model directory, engine directory or .onnx file.")],
    inputs: Annotated[
        list[Path] | None, typer.Option("--input", help=".npz, .jsonl, PNG or JPEG file, or folder of images.")
    ] = None,
    output: Annotated[Path | None, written("outputs, and classes, to this .npz")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples that are run at once; by default 32.")] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Say prompts to the model in its chat template.")] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many tokens follow a prompt; by default generation_config.json's, or 64."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Draw tokens, the wilder the higher; 0 takes the likeliest. By default generation_config.json's, "
            "or 0.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Draw from so many of the likeliest tokens, 0 for all; by default generation_config.json's, or all.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest of these that together have this probability; by default "
            "generation_config.json's, or 1."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draws; by default 0.")] = None,
    stops: Annotated[list[str] | None, typer.Option("--stop", help="Text before which an answer ends.")] = None,
    threads: Threads = 0,
    provider: ProviderName = None,
    provider_option: ProviderOptions = None,
    cpu_fallback: CpuFallback = False,
    parallel: Parallel = 1,
    spinning: Spinning = True,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Run a model or an engine over files, or let a decoder go on from prompts."""
    if bool(inputs) == bool(prompts):
        raise UserError(
            "there is nothing to run" if not inputs else "files and prompts cannot be run at once",
            hint="give files with --input, or texts with --prompt",
        )
    execution = execution_of(provider, provider_option, cpu_fallback, parallel, spinning, cache)
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    if inputs:
        _refuse(sampling | {"stop": stops or None, "chat": chat or None}, "--prompt", "--input")
        _predict(model, inputs, output, batch_size or _BATCH, threads, execution, as_json)
        return
    _refuse({"output": output, "batch_size": batch_size}, "--input", "--prompt")
    from runtime.text.answer import answer

    streams = len(prompts or ()) == 1 and not as_json
    with contextlib.nullcontext(silent) if streams else console.progress(f"opening {model}") as tell:
        answers = answer(
            model,
            prompts or (),
            chat=chat,
            threads=threads,
            execution=execution,
            on_text=console.piece if streams else None,
            stop_strings=stops or None,
            on_progress=tell,
            **sampling,
        )
    texts = "\n".join(f"{found.prompt!r}: {found.text}" for found in answers)
    console.result("" if streams else texts, {"answers": [dataclasses.asdict(found) for found in answers]}, as_json)


def _refuse(given: Mapping[str, object], goes_with: str, found: str) -> None:
    """Options that say something about ``goes_with`` say nothing where ``found`` is given."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names:
        raise UserError(
            f"{', '.join(sorted(names))} go with {goes_with}, not with {found}",
            hint=f"leave out what does not go with {found}",
        )


def _predict(
    model: Path,
    inputs: list[Path],
    output: Path | None,
    batch_size: int,
    threads: int,
    execution: "Execution",
    as_json: bool,
) -> None:
    from runtime.run import run as predict

    with console.progress(f"opening {model}") as tell:
        predictions = predict(model, inputs, output, batch_size, threads=threads, execution=execution, on_progress=tell)
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
