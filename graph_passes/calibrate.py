"""Calibrate an ONNX model: run task data through a variant of it that shows its experts, and sum up what they do."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from graph_passes.describe import Model, io_of, read_model
from graph_passes.expert_sums import Seen, layer_statistics
from graph_passes.model_file import link_weights, save_variant
from graph_passes.proof.prove import prove_variant
from graph_passes.proof.runnable import check_runnable
from graph_passes.task_data import check_batches, fit_data
from graph_passes.variants.float4 import Float4Runner
from graph_passes.variants.observe_experts import EXPERTS, save_experts_observed
from moe_spec.calibration import Layers, Run, Shards, accumulate, shards_of
from moe_spec.dataset import MASK, Dataset, load_dataset
from moe_spec.errors import UserError
from moe_spec.files import refuse_existing
from moe_spec.manifest import MODEL
from moe_spec.progress import Progress, silent
from moe_spec.runner import Feeds, Runner
from moe_spec.statistics import Statistics

_ELSEWHERE = "calibrate the checkpoint, or the ONNX file that this one was made from"


def calibrate(
    source: Path,
    data: Path,
    out: Path,
    runner: Runner,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    shard_size: int | None = None,
    on_progress: Progress = silent,
) -> Statistics:
    """Run task data through an ONNX model and write statistics.safetensors.

    They are those of the checkpoint that the model was exported from, and carry its identity, as far as the graph shows
    them (`graph_passes.expert_sums`). What an earlier, killed run has kept is not computed again.

    Args:
        source: ONNX file or model directory, whoever exported it.
        data: .npz of the graph's inputs or of images (``moe_spec.dataset``); labels are not used. Tokens whose
            ``attention_mask`` is 0 are not counted; without a mask all are.
        out: statistics to write; must not exist.
        runner: runs the variant, after it has been compared with the model.
        batch_size: examples a run.
        limit: use only the first so many examples.
        shard_size: keep what there is after every so many examples, in ``moe_spec.calibration.shards_of(out)``, until
            the run has come to its end.
        on_progress: told after every batch.

    Raises:
        UserError: ``out`` exists, the model has a layer that is not recognised or cannot be observed or run, the data
            cannot be read or do not fit, or another run has left its shards beside ``out``.
        VerificationError: the variant computes something else than the model.
    """
    refuse_existing(out)
    runner = Float4Runner(runner)
    model = read_model(source)
    dataset = _load(model, data, batch_size, limit)
    run = Run(model.model_sha256, dataset.sha256, len(dataset), batch_size, options={"onnx": model.parent_sha256})
    shards = Shards(shards_of(out), run, shard_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _observed(model, runner, out.parent) as (variant, outputs), runner.open(variant) as graph:

        def take(feeds: Feeds) -> Layers:
            seen = graph.run(feeds, [name for names in outputs.values() for name in names])
            layers = [Seen(*(seen[name] for name in names)) for names in outputs.values()]
            valid_T = _valid(feeds, len(layers[0].ids_TK), str(data))
            return tuple(layer_statistics(*both, valid_T) for both in zip(model.blocks, layers, strict=True))

        layers = accumulate(dataset, take, shards, batch_size=batch_size, on_progress=on_progress)
    statistics = Statistics(model.model_sha256, (dataset.sha256,), layers)
    statistics.save(out)
    shards.remove()
    return statistics


def _load(model: Model, path: Path, batch_size: int, limit: int | None) -> Dataset:
    """The data as the graph takes it."""
    inputs, _ = io_of(model.graph)
    dataset = load_dataset(path, model.path, limit=limit)
    check_batches(dataset, inputs, batch_size, str(model.path))
    return fit_data(dataset, inputs, str(path))


@contextlib.contextmanager
def _observed(model: Model, runner: Runner, beside: Path) -> Iterator[tuple[Path, Mapping[str, list[str]]]]:
    """A variant of ``model``, for the time being, in a directory in ``beside``; for each block what shows it."""
    if not model.blocks:
        raise UserError(f"{model.path} has one expert in each layer, nothing is routed", hint=_ELSEWHERE)
    with tempfile.TemporaryDirectory(prefix=".observed.", dir=beside) as directory:
        scratch = Path(directory)
        link_weights(model.graph, model.path.parent, scratch)
        save_variant(model.graph, scratch / MODEL)
        try:
            check_runnable(model.graph.nodes, str(model.path))
            outputs = save_experts_observed(scratch, check=False)  # its weights are links, and it is proven
        except UserError as refusal:  # what it says is right, but its hint is for `optimize`
            raise UserError(refusal.what, hint=_ELSEWHERE) from refusal
        prove_variant(scratch, EXPERTS, runner)
        yield scratch / EXPERTS, outputs


def _valid(feeds: Feeds, tokens: int, where: str) -> npt.NDArray[np.bool_]:
    """(T,): which tokens are no padding."""
    if MASK not in feeds:
        return np.ones(tokens, np.bool_)
    valid_T: npt.NDArray[np.bool_] = feeds[MASK].ravel() != 0
    if len(valid_T) != tokens:
        raise UserError(
            f"{where}: {MASK} has {len(valid_T)} entries in a batch of which the experts see {tokens} tokens",
            hint="padding cannot be told from other tokens here; calibrate the checkpoint",
        )
    return valid_T
