"""A model larger than memory: spread over GPUs, memory and disk by accelerate, each layer loaded where it runs."""

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.checkpoints import load_empty, quiet
from models.stored_parameters import StoredParameters
from moe_spec.errors import UserError, require_known

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""In which order accelerate fills the devices."""

_DISK = "disk"
_SHARE = 0.9
"""Of the free memory that weights may fill."""


def load_spread(
    directory: Path,
    device_map: str = "auto",
    max_memory: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint in eval mode; what no memory holds is read from the checkpoint whenever it is needed.

    Nothing is written: the weights of a module come from the checkpoint's own files before it runs, and go after it.
    https://huggingface.co/docs/accelerate/usage_guides/big_modeling

    Args:
        directory: config.json and safetensors weights; it has to stay as it is.
        device_map: one of ``DEVICE_MAPS``.
        max_memory: of the machine, for weights, those of the largest layer included, e.g. ``4GB``; None: what is free.
        dtype: what floating-point weights are cast to.
        trust_remote_code: run the Python files that config.json names (`models.own_code`).

    Raises:
        UserError: an unknown ``device_map``, ``max_memory`` that is none, or what ``load_model`` refuses.
        ModuleNotFoundError: accelerate is not installed.
    """
    require_known(device_map, "device map", DEVICE_MAPS)
    import accelerate

    memory = None if max_memory is None else parse_memory(max_memory)
    model = load_empty(directory, dtype, trust_remote_code=trust_remote_code)
    stored = StoredParameters(directory, dtype, trust_remote_code=trust_remote_code)
    places = _places(model, device_map, memory)
    _fill(model, stored, places)
    held = {name: value for name, value in model.state_dict().items() if _place(places, name) == "cpu"}
    values = ChainMap[str, Tensor](held, stored)  # type: ignore[arg-type]  # nobody writes to it
    with quiet():
        accelerate.dispatch_model(
            model,
            device_map=places,
            state_dict=values,
            offload_index={},  # the state dict has everything
            skip_keys=model._skip_keys_device_placement,
        )
    return model


def memory_for_weights(at_most: int | None = None) -> int:
    """Bytes of this machine's memory that weights may fill: ``at_most``, or what is free but for a tenth."""
    from accelerate.utils import get_max_memory

    return int(_SHARE * get_max_memory()["cpu"]) if at_most is None else at_most


def parse_memory(text: str) -> int:
    """Bytes: ``4GB`` is 4 * 10^9, ``4GiB`` 4 * 2^30, in small letters too.

    Raises:
        UserError: no such number.
    """
    from accelerate.utils import convert_file_size_to_int

    try:
        size: int = convert_file_size_to_int(text.upper())  # a small b is a bit there
    except (ValueError, OverflowError) as error:
        raise UserError(f"--max-memory {text} is no amount of memory", hint="for example 4GB, 900MB or 4GiB") from error
    return size


def _places(model: PreTrainedModel, order: str, max_memory: int | None) -> dict[str, Any]:
    """Where each module goes: a GPU's number, ``cpu`` or ``disk``."""
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    memory, whole_layers = get_max_memory(), model._no_split_modules
    memory["cpu"] = memory_for_weights(max_memory)
    if order != "sequential":
        memory = get_balanced_memory(model, memory, whole_layers)
    places: dict[str, Any] = infer_auto_device_map(model, memory, whole_layers)
    return places


def _place(places: Mapping[str, Any], name: str) -> Any:
    """Where a parameter goes: with the innermost module that has a place."""
    return places[name] if name in places else _place(places, name.rpartition(".")[0])


def _fill(model: PreTrainedModel, stored: Mapping[str, Tensor], places: Mapping[str, Any]) -> None:
    """Give values to what does not wait on the disk, and to buffers, which are few and small."""
    from accelerate.utils import set_module_tensor_to_device

    buffers = {name for name, _ in model.named_buffers()}
    for name in model.state_dict():
        place = _place(places, name)
        if place != _DISK or name in buffers:
            set_module_tensor_to_device(model, name, "cpu" if place == _DISK else place, value=stored[name])
    with quiet():
        model.tie_weights()
