"""Task data as a model takes it, and whether it fits the model, checked before anything runs."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_spec.dataset import MASK
from moe_spec.errors import UserError, did_you_mean

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
"""What the decoder of an encoder-decoder reads."""

OPTIONAL_INPUTS = (MASK, "token_type_ids", "position_ids", DECODER_IDS, DECODER_MASK)
"""What a data set may hold beside the model's main input."""


def check_inputs(feeds: Mapping[str, npt.NDArray[Any]], model: PreTrainedModel, where: str) -> None:
    """Refuse arrays that ``model`` has no input for, or cannot take; ``where`` names their file.

    Raises:
        UserError: the main input is missing, an array is unknown, of another shape or kind, or ids are not in the
            vocabulary.
    """
    main = model.main_input_name
    takes = {main, *(name for name in OPTIONAL_INPUTS if name in inspect.signature(model.forward).parameters)}
    for name in feeds:
        if name not in takes:
            raise UserError(
                f"{where} holds the array {name!r}, which the {model.config.model_type} model does not take",
                hint=did_you_mean(name, takes),
            )
    if main not in feeds:
        raise UserError(f"{where} lacks the array {main!r}", hint=f"store the model's input as {main!r}")
    if main == "pixel_values":
        _check_pixels(feeds[main], model.config, where)
    elif main == "input_ids":
        _check_ids(feeds, model.config.get_text_config().vocab_size, where)


def tensors_of(
    feeds: Mapping[str, npt.NDArray[Any]], dtype: torch.dtype, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Arrays as tensors on ``device``: ids and masks as int64, everything else in ``dtype``, the model's."""
    return {name: _tensor(array, dtype).to(device) for name, array in feeds.items()}


def valid_tokens(batch: Mapping[str, Any], layer: str = "") -> Tensor | None:
    """(T,) bool: which tokens of a model's arguments are no padding; None where all count.

    Those of an encoder-decoder are the decoder's, but for a ``layer`` of the encoder.
    """
    decodes = DECODER_IDS in batch and not layer.startswith("encoder.")
    mask_BS: Tensor | None = batch.get(DECODER_MASK if decodes else MASK)
    return None if mask_BS is None else mask_BS.flatten() != 0


def _tensor(array: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    if array.dtype.kind in "biu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def _check_pixels(pixels: npt.NDArray[Any], config: Any, where: str) -> None:
    expected = (config.num_channels, config.image_size, config.image_size)
    if pixels.dtype.kind != "f" or pixels.shape[1:] != expected:
        raise UserError(
            f"{where}: pixel_values are {pixels.dtype}{list(pixels.shape)}, expected float [N, "
            f"{', '.join(map(str, expected))}]",
            hint="store them as the model takes them, or store uint8 `images`",
        )


def _check_ids(feeds: Mapping[str, npt.NDArray[Any]], vocabulary: int, where: str) -> None:
    ids = feeds["input_ids"]
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.size == 0:
        raise UserError(
            f"{where}: input_ids are {ids.dtype}{list(ids.shape)}, expected integers [N, S]",
            hint="pad token ids to one length; attention_mask 0 marks the padding",
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(
            f"{where}: input_ids go from {ids.min()} to {ids.max()}, but the vocabulary has {vocabulary} entries",
            hint="tokenise with the tokenizer of this model",
        )
    for name, array in feeds.items():
        beside = DECODER_IDS if name.startswith("decoder_") and DECODER_IDS in feeds else "input_ids"
        if array.shape != feeds[beside].shape:
            raise UserError(
                f"{where}: {name} is {list(array.shape)}, but {beside} are {list(feeds[beside].shape)}",
                hint=f"store one {name} entry a token",
            )
