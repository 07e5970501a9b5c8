"""Parameters of a checkpoint, put together from its own files whenever they are asked for."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from models.adapters import conversions_of
from models.checkpoints import load_skeleton, quiet, stored_tensors
from models.moe_layers import axis_of_experts, tensors_by_expert
from models.stored_names import EXPERT_ID, parameter_names
from moe_spec.errors import UserError

PIECE_BYTES = 1 << 26
"""Of experts that are read at once; a larger one is a piece of its own."""


class StoredParameters(Mapping[str, Tensor]):
    """``parameters[name]``: a parameter or buffer of the model, read anew each time, by transformers' own loader.

    transformers offloads to disk by writing every parameter that it does not find as such: the stacked experts, that is
    nearly all of a MoE, and in the dtype of the model, not of the files. Here nothing is written, and who asks for
    `pieces` never has all experts of a layer in memory.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> None:
        """Read the headers of a checkpoint's files.

        Args:
            directory: config.json and safetensors weights.
            dtype: what floating-point values are cast to.
            trust_remote_code: run the Python files that config.json names (`models.own_code`).

        Raises:
            UserError: no checkpoint of a known family, files that are not complete, or weights that do not fill the
                model, or of which one is cut into several parameters (`models.stored_names.is_cut`).
        """
        self._directory, self._dtype = directory, dtype
        self._skeleton = load_skeleton(directory, trust_remote_code=trust_remote_code)
        self._layers = tensors_by_expert(self._skeleton)
        self._tensors = stored_tensors(directory)
        transforms: list[Any] = conversions_of(self._skeleton)
        self._loading = LoadStateDictConfig(weight_mapping=transforms)
        tied: Mapping[str, str] = self._skeleton.all_tied_weights_keys
        self._home = {name: tied.get(name, name) for name in self._skeleton.state_dict()}
        self._parts: dict[str, list[str]] = defaultdict(list)
        self._read_as: dict[str, str] = {}
        for stored, name in parameter_names(self._skeleton, self._tensors, directory).items():
            home = self._home[name]
            if self._read_as.setdefault(home, name) == name:  # of tied weights that are stored twice, one
                self._parts[home].append(stored)
        cut = sorted(set(self._home.values()) - self._parts.keys())
        if cut:
            raise UserError(
                f"{directory} has {cut[0]!r} as a part of another tensor, which only the whole model is read from",
                hint="leave out --device-map; the model must fit into memory",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._home[name], self._dtype)

    def pieces(
        self, name: str, keep: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """A parameter or buffer, one after the other in pieces of its first axis; one piece, where it is no experts'.

        Args:
            name: of the parameter or buffer.
            keep: ids of the experts whose values are asked for, ascending; only they are read. None: all.
            dtype: what floating-point values are cast to; None: that of all.

        Raises:
            UserError: config.json asks for another shape.
        """
        home, dtype = self._home[name], dtype or self._dtype
        layer = self._layers.get(home)
        if layer is None or not self.lies_by_expert(name):
            whole = self._read(home, dtype)
            if layer is not None and keep is not None:
                whole = whole.index_select(axis_of_experts(whole, layer.num_experts), torch.tensor(keep))
            yield whole
            return
        ids = range(layer.num_experts) if keep is None else keep
        values = self._skeleton.state_dict()[home][0].numel()
        step = max(1, PIECE_BYTES // max(1, values * dtype.itemsize))
        for start in range(0, len(ids), step):
            yield self._read(home, dtype, ids[start : start + step])

    def lies_by_expert(self, name: str) -> bool:
        """Whether the files hold a tensor an expert of this parameter, or one whose rows become its rows."""
        home = self._home[name]
        experts = self._layers[home].num_experts
        numbers = [EXPERT_ID.search(stored) for stored in self._parts[home]]
        patterns = {EXPERT_ID.sub("*", stored) for stored in self._parts[home]}
        if all(number is not None for number in numbers):
            found = sorted(int(number[0]) for number in numbers if number is not None)
            return found == sorted([*range(experts)] * len(patterns))
        return all(self._tensors[stored].shape[:1] == (experts,) for stored in self._parts[home])

    def _read(self, home: str, dtype: torch.dtype, ids: Sequence[int] | None = None) -> Tensor:
        """What transformers' loader makes of the stored parts, or of those of the experts ``ids``."""
        path, _, attribute = self._read_as[home].rpartition(".")
        module = self._skeleton.get_submodule(path)
        before: Tensor = getattr(module, attribute)
        shape = before.shape if ids is None else (len(ids), *before.shape[1:])
        empty = torch.empty(shape, dtype=dtype if before.is_floating_point() else before.dtype, device="meta")
        is_parameter = isinstance(before, torch.nn.Parameter)
        setattr(module, attribute, torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty)
        try:
            with contextlib.ExitStack() as opened, quiet():
                parts = dict(self._opened_parts(home, ids, opened))
                convert_and_load_state_dict_in_model(self._skeleton, parts, self._loading)
            value: Tensor = getattr(module, attribute)
        finally:
            setattr(module, attribute, before)
        if value.is_meta:
            raise UserError(
                f"{self._directory} has {home!r} in another shape than its config.json asks for",
                hint="config.json and the weights must describe the same model; get the checkpoint again",
            )
        return value.detach()

    def _opened_parts(
        self, home: str, ids: Sequence[int] | None, opened: contextlib.ExitStack
    ) -> Iterator[tuple[str, Any]]:
        """Names and values of stored tensors, which the loader reads; of a tensor for all experts, the rows ``ids``."""
        files: dict[Path, Any] = {}
        for stored in self._parts[home]:
            number, path = EXPERT_ID.search(stored), self._tensors[stored].spans[0].path
            if ids is not None and number is not None and int(number[0]) not in ids:
                continue
            if path not in files:
                files[path] = opened.enter_context(safetensors.safe_open(path, "pt"))
            part = files[path].get_slice(stored)
            yield stored, part if ids is None or number is not None else torch.stack([part[row] for row in ids])
