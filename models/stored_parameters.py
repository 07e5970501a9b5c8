"""Parameters of a checkpoint, put together from its own files whenever they are asked for."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from models.adapters import conversions_of
from models.checkpoints import load_skeleton, quiet, stored_tensors
from models.stored_names import parameter_names
from moe_spec.errors import UserError


class StoredParameters(Mapping[str, Tensor]):
    """``parameters[name]``: a parameter or buffer of the model, read anew each time, by transformers' own loader.

    transformers offloads to disk by writing every parameter that it does not find as such: the stacked experts, that is
    nearly all of a MoE, and in the dtype of the model, not of the files. Here nothing is written.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        """Read the headers of a checkpoint's files.

        Args:
            directory: config.json and safetensors weights.
            dtype: what floating-point values are cast to.

        Raises:
            UserError: no checkpoint of a known family, files that are not complete, or weights that do not fill the
                model.
        """
        self._directory, self._dtype = directory, dtype
        self._skeleton = load_skeleton(directory)
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __getitem__(self, name: str) -> Tensor:
        home = self._home[name]
        with contextlib.ExitStack() as opened:
            paths = {stored: self._tensors[stored].spans[0].path for stored in self._parts[home]}
            files = {path: opened.enter_context(safetensors.safe_open(path, "pt")) for path in set(paths.values())}
            slices = {stored: files[path].get_slice(stored) for stored, path in paths.items()}
            with quiet():
                convert_and_load_state_dict_in_model(self._skeleton, slices, self._loading)
        return self._taken(self._read_as[home])

    def _taken(self, name: str) -> Tensor:
        """What the loader put into the skeleton, which is then as empty as before."""
        path, _, attribute = name.rpartition(".")
        module = self._skeleton.get_submodule(path)
        value: Tensor = getattr(module, attribute)
        if value.is_meta:
            raise UserError(
                f"{self._directory} has {name!r} in another shape than its config.json asks for",
                hint="config.json and the weights must describe the same model; get the checkpoint again",
            )
        empty = value.to("meta")
        is_parameter = isinstance(value, torch.nn.Parameter)
        setattr(module, attribute, torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty)
        return value.detach().to(self._dtype if value.is_floating_point() else value.dtype)
