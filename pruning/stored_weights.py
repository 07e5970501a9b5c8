"""Routers and experts as they lie in a checkpoint's files, read a piece at a time: no model is ever in memory."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from torch import Tensor

from models.checkpoints import load_skeleton, stored_tensors
from models.families import family_of
from models.moe_layers import MoELayer, find_moe_layers, tensors_by_expert
from models.stored_names import EXPERT_ID, parameter_names
from pruning.stream import require_by_layer, require_experts

_PIECE = 2**18
"""Elements that are made float64 at a time: 2 MiB."""


class StoredWeights:
    """The router and the experts of every MoE layer of a checkpoint.

    Attributes:
        checkpoint: the directory.
        layers: in model order, without their weights.
    """

    checkpoint: Path
    layers: tuple[MoELayer, ...]

    def __init__(self, checkpoint: Path, *, trust_remote_code: bool = False) -> None:
        """Read the headers of a checkpoint's files.

        Raises:
            UserError: no checkpoint of a known family, files that are not complete or hold two layers in one list, or
                experts that are missing.
        """
        self.checkpoint = checkpoint
        skeleton = load_skeleton(checkpoint, trust_remote_code=trust_remote_code)
        self._tensors = stored_tensors(checkpoint)
        self._parts: dict[str, list[str]] = defaultdict(list)
        names = parameter_names(skeleton, self._tensors, checkpoint)
        require_by_layer(tensors_by_expert(skeleton), names, checkpoint)
        for stored, name in names.items():
            self._parts[name].append(stored)
        self._family = family_of(skeleton.config)
        self.layers = find_moe_layers(skeleton)
        counts = {stored: layer.num_experts for layer in self.layers for stored in self._matrices(layer)}
        require_experts(self._tensors, counts, checkpoint, in_runs=self._family.in_runs)

    def router(self, layer: MoELayer) -> npt.NDArray[np.float64]:
        """The router's rows, (E, H)."""
        (stored,) = self._parts[f"{layer.name}.{self._family.router}.{self._family.router_tensors[0]}"]
        with self._open(stored) as file:
            return _float64(file.get_tensor(stored))

    def experts(self, layer: MoELayer) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Ids and values, in pieces, of all matrices of all experts; not of biases."""
        for stored in self._matrices(layer):
            number = EXPERT_ID.search(stored)
            with self._open(stored) as file:
                if number is not None:
                    yield from ((int(number[0]), piece) for piece in _pieces(file.get_tensor(stored)))
                    continue
                rows_E = file.get_slice(stored)
                length = self._tensors[stored].shape[0] // layer.num_experts  # rows of an expert: 1, or F of (E F, H)
                for expert in range(layer.num_experts):
                    rows = rows_E[expert * length : (expert + 1) * length]
                    yield from ((expert, piece) for piece in _pieces(rows))

    def _matrices(self, layer: MoELayer) -> list[str]:
        parameters = layer.experts.named_parameters(recurse=False)
        names = (f"{layer.name}.{self._family.experts}.{name}" for name, matrix_E in parameters if matrix_E.dim() > 2)
        return [stored for name in names for stored in self._parts[name]]

    def _open(self, stored: str) -> contextlib.AbstractContextManager[Any]:
        opened: contextlib.AbstractContextManager[Any] = safetensors.safe_open(
            self._tensors[stored].spans[0].path, framework="pt"
        )
        return opened


def _pieces(values: Tensor) -> Iterator[npt.NDArray[np.float64]]:
    return (_float64(piece) for piece in torch.split(values.flatten(), _PIECE))


def _float64(values: Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.double().numpy()
    return array
