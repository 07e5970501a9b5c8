"""One process of several: ``torchrun --nproc-per-node N moe-edge calibrate ...``. All that is distributed is here."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moe_spec.calibration import Layers
from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.statistics import KEYS, LayerStatistics

PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest one. torchrun ends them all when one of them fails."""


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes that share the data, as one of them sees them.

    Attributes:
        rank: of this process, from 0; the first one writes.
        size: how many there are.
        device: what this process computes on.
    """

    rank: int
    size: int
    device: torch.device

    def share(self, dataset: Dataset, batch_size: int) -> Dataset:
        """This process's part of the data: whole batches, so that all batches are those of a single process.

        Raises:
            UserError: there are fewer batches than processes.
        """
        batches = -(-len(dataset) // batch_size)
        if batches < self.size:
            raise UserError(
                f"{len(dataset)} examples are {batches} batch(es) of {batch_size}, too few for {self.size} processes",
                hint="start fewer processes, or give a smaller --batch-size",
            )
        start, stop = (batches * rank // self.size * batch_size for rank in (self.rank, self.rank + 1))
        return dataset.part(start, stop)

    def total(self, layers: Layers) -> Layers:
        """The statistics of all processes together, in every process: float64 sums, and the largest of peaks."""
        return layers if self.size == 1 else tuple(self._total(layer) for layer in layers)

    def _total(self, layer: LayerStatistics) -> LayerStatistics:
        sums = {key: self._reduce(layer.sums[key], KEYS[key].largest) for key in sorted(layer.sums)}
        tokens = self._reduce(np.array(layer.token_count), largest=False)
        return dataclasses.replace(layer, token_count=int(tokens), sums=sums)

    def _reduce(self, values: npt.NDArray[np.generic], largest: bool) -> npt.NDArray[np.float64]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor.cpu().numpy()


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """The processes that torchrun started, or this one alone.

    Where there are GPUs, each computes on its own and nccl connects them; else gloo does.

    Raises:
        UserError: a machine runs more processes than it has GPUs.
    """
    rank, size, local = (int(os.environ.get(*entry)) for entry in _ENVIRONMENT)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = _gpu(local)
    if size == 1:
        yield Team(rank, size, device)
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=PATIENCE)
    try:
        yield Team(rank, size, device)
    finally:
        dist.destroy_process_group()


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
"""What torchrun tells a process, and what holds without it."""


def _gpu(local: int) -> torch.device:
    """The GPU of process ``local`` of this machine."""
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise UserError(
            f"process {local} of this machine finds no GPU of its own, there are {gpus}",
            hint=f"torchrun --nproc-per-node {gpus}",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
