"""Run task data through a model and record what its routers and experts do.

The result, the statistics, is what plan ranks experts by: how many tokens each was given, with what gates, and how
large its outputs were. Labels are not needed. An ONNX model is run by ONNX Runtime and needs no torch; a few criteria
need statistics that only a checkpoint gives, and plan says so.

Under torchrun the processes share the data. --device-map spreads a checkpoint that is larger than memory over GPUs,
memory and disk; what waits on the disk is read again for every batch, so give a large --batch-size. With --shard-size a
run that was interrupted goes on where it was, by the same command.

Example: moe-edge calibrate checkpoint/ --data train.npz -o statistics.safetensors
Example: moe-edge calibrate checkpoint/ --data train.npz --dense -o dense.safetensors
Example: moe-edge calibrate exported/ --data train.npz -o onnx.safetensors
Example: torchrun --nproc-per-node 4 --no-python moe-edge calibrate checkpoint/ --data train.npz -o all.safetensors
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import AsJson, Output, TrustRemoteCode
from cli.trust import warn_of_code
from moe_spec.errors import UserError

if TYPE_CHECKING:
    from moe_spec.statistics import Statistics


def calibrate(
    model: Annotated[Path, typer.Argument(help="Checkpoint, model directory or .onnx file.")],
    data: Annotated[Path, typer.Option(help=".npz of model inputs, or of uint8 `images`.")],
    output: Output,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a forward pass.")] = 32,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first so many examples; all without it.")
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run every expert on every token too; hc-smoe and ream need it.")
    ] = False,
    shard_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep what there is after every so many examples, in OUTPUT.shards; nothing is kept without it."
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="auto, balanced or sequential, as accelerate has them; without it the model is on one GPU, or in "
            "memory.",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --device-map: what weights may fill of the machine's memory, e.g. 4GB; by default all that "
            "is free.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write statistics.safetensors."""
    with _told_what_is_kept(output), console.progress(f"loading {model}") as tell:
        run = _calibration_of(model, dense, device_map, max_memory, trust_remote_code=trust_remote_code)
        statistics = run(
            model,
            data,
            output,
            batch_size=batch_size,
            limit=limit,
            shard_size=shard_size,
            on_progress=tell,
        )
    report(output, statistics, as_json)


def _calibration_of(
    model: Path, dense: bool, device_map: str | None, max_memory: str | None, *, trust_remote_code: bool
) -> "Callable[..., Statistics]":
    """The function for this kind of model."""
    from moe_spec.identity import is_onnx

    if not is_onnx(model):
        from pruning.calibrate import calibrate as of_checkpoint

        warn_of_code(model, trusted=trust_remote_code)
        return partial(
            of_checkpoint,
            dense=dense,
            device_map=device_map,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
        )
    for option, asked in (
        ("--dense", dense),
        ("--device-map", device_map is not None),
        ("--max-memory", max_memory is not None),
        ("--trust-remote-code", trust_remote_code),
        ("torchrun", os.environ.get("WORLD_SIZE", "1") != "1"),
    ):
        if asked:
            raise UserError(
                f"{option} is for checkpoints, {model} is an ONNX model",
                hint="calibrate the checkpoint, or parts of the data one by one: moe-edge merge adds them up",
            )
    from graph_passes.calibrate import calibrate as of_onnx
    from runtime.onnxruntime.backend import OnnxRuntimeRunner

    return partial(of_onnx, runner=OnnxRuntimeRunner())


@contextlib.contextmanager
def _told_what_is_kept(output: Path) -> Iterator[None]:
    """Says at ctrl-C where the run would go on."""
    from moe_spec.calibration import shards_of

    try:
        yield
    except KeyboardInterrupt:
        if shards_of(output).exists():
            console.step(f"{shards_of(output)} keeps what is done; the same command goes on from there")
        raise


def report(output: Path, statistics: "Statistics", as_json: bool) -> None:
    """What the new file ``output`` holds."""
    tokens = statistics.layers[0].token_count
    payload = {
        "output": str(output),
        "model_sha256": statistics.model_sha256,
        "data_sha256": list(statistics.data_sha256),
        "layers": [
            {"name": layer.name, "experts": layer.experts, "top_k": layer.top_k, "token_count": layer.token_count}
            for layer in statistics.layers
        ],
    }
    console.result(f"{output}: {len(statistics.layers)} MoE layers, {tokens} tokens each", payload, as_json)
