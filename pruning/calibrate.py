"""Calibrate: one pass over task data, and the statistics file by which criteria rank experts."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from models.checkpoints import load_model
from models.spread import load_spread
from moe_spec.calibration import Layers, Run, Shards, accumulate, shards_of
from moe_spec.dataset import load_dataset
from moe_spec.errors import UserError
from moe_spec.files import refuse_existing
from moe_spec.identity import checkpoint_sha256, checkpoint_weights
from moe_spec.progress import Progress, silent
from moe_spec.runner import Feeds
from moe_spec.statistics import Statistics
from pruning.collect import collect
from pruning.distributed import team
from pruning.inputs import check_inputs, tensors_of


def calibrate(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    dense: bool = False,
    shard_size: int | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress = silent,
) -> Statistics:
    """Run task data through a checkpoint and write statistics.safetensors.

    Under torchrun each process takes its share of the batches, and the first one writes: the same statistics as one
    process, up to the order of summation. What an earlier, killed run has kept is not computed again.

    Args:
        checkpoint: transformers directory of a known MoE family.
        data: .npz of model inputs or of images (``moe_spec.dataset``); labels are not used.
        out: statistics to write; must not exist.
        batch_size: examples a forward pass.
        limit: use only the first so many examples.
        dense: take the dense statistics too, for which every expert runs on every token.
        shard_size: keep what there is after every so many examples, in ``moe_spec.calibration.shards_of(out)``, until
            the run has come to its end.
        device_map: how accelerate spreads a model larger than memory over GPUs, memory and disk
            (``models.spread``); None: all of it on the GPU of this process, or in memory without one.
        max_memory: with ``device_map``: how much of the machine's memory weights may fill, e.g. ``4GB``; None: what is
            free. What finds no place is read from the checkpoint again for every batch, so batches should be large.
        trust_remote_code: run the Python files that config.json names (`models.own_code`).
        on_progress: told after every batch what this process has done of its share.

    Raises:
        UserError: ``out`` exists, checkpoint or data cannot be read or do not fit together, or another run has left
            its shards beside ``out``.
    """
    refuse_existing(out)
    checkpoint_weights(checkpoint)  # refuse what is none before the data is blamed
    dataset = load_dataset(data, checkpoint, limit=limit)
    with team() as us:
        model = _loaded(checkpoint, device_map, max_memory, us.device, trust_remote_code=trust_remote_code)
        check_inputs(dataset.feeds, model, str(data))
        share = us.share(dataset, batch_size)

        def take(feeds: Feeds) -> Layers:
            return collect(model, [tensors_of(feeds, model.dtype, us.device)], dense=dense)

        model_sha256 = checkpoint_sha256(checkpoint, on_progress)
        run = Run(model_sha256, dataset.sha256, len(dataset), batch_size, us.size, {"dense": dense})
        shards = Shards(shards_of(out), run, shard_size, us.rank)
        mine = accumulate(share, take, shards, batch_size=batch_size, on_progress=on_progress)
        statistics = Statistics(model_sha256, (dataset.sha256,), us.total(mine))
        if us.rank == 0:
            statistics.save(out)
            shards.remove()
    return statistics


def _loaded(
    checkpoint: Path, device_map: str | None, max_memory: str | None, device: torch.device, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The model on ``device``, or spread by ``device_map``."""
    if device_map is not None:
        return load_spread(checkpoint, device_map, max_memory, trust_remote_code=trust_remote_code)
    if max_memory is not None:
        raise UserError("--max-memory is for a model that is spread over devices", hint="spread it: --device-map auto")
    model = load_model(checkpoint, trust_remote_code=trust_remote_code)
    nn.Module.to(model, device)  # in place; transformers' own is not typed
    return model
