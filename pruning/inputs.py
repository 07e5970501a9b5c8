"""Task data as a model takes it, and whether it fits the model, checked before anything runs."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_spec.dataset import MASK
from moe_spec.errors import UserError, did_you_mean

IDS = "input_ids"
DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
"""What the decoder of an encoder-decoder reads."""

OPTIONAL_INPUTS = (MASK, "token_type_ids", "position_ids", DECODER_IDS, DECODER_MASK)
"""What a data set may hold beside the model's main input."""


def check_inputs(feeds: Mapping[str, npt.NDArray[Any]], model: PreTrainedModel, where: str) -> None:
    """Refuse arrays that ``model`` has no input for, or cannot take; ``where`` names their file.

    Raises:
        UserError: an input is missing, an array is unknown, of another shape or kind, ids are not in the vocabulary, or
            positions or texts go beyond what the model has embeddings for.
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
    elif main == IDS:
        _check_texts(feeds, model, where)


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


def _check_texts(feeds: Mapping[str, npt.NDArray[Any]], model: PreTrainedModel, where: str) -> None:
    config: Any = model.config
    if config.is_encoder_decoder and DECODER_IDS not in feeds:
        raise UserError(
            f"{where} lacks the array {DECODER_IDS!r}",
            hint="store what the decoder reads beside the input_ids of the encoder",
        )
    for name in (IDS, DECODER_IDS):
        if name in feeds:
            _check_ids(name, feeds[name], config.get_text_config().vocab_size, where)
    rows = _rows_of_embeddings(model)
    longest = rows.get("position_ids")
    if longest is not None and feeds[IDS].shape[1] > longest:
        raise UserError(
            f"{where}: {IDS} are {list(feeds[IDS].shape)}, but the model takes texts of at most {longest} tokens",
            hint=f"cut them to {longest}",
        )
    for name, array in feeds.items():
        _check_beside(name, array, feeds, where)
        most = rows.get(name)
        if most is not None and not 0 <= array.min() <= array.max() < most:
            raise UserError(
                f"{where}: {name} go from {array.min()} to {array.max()}, but the model has {most} of them",
                hint=f"store {name} from 0 to {most - 1}",
            )


def _check_ids(name: str, ids: npt.NDArray[Any], vocabulary: int, where: str) -> None:
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.size == 0:
        raise UserError(
            f"{where}: {name} are {ids.dtype}{list(ids.shape)}, expected integers [N, S]",
            hint="pad token ids to one length; attention_mask 0 marks the padding",
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(
            f"{where}: {name} go from {ids.min()} to {ids.max()}, but the vocabulary has {vocabulary} entries",
            hint="tokenise with the tokenizer of this model",
        )


def _check_beside(name: str, array: npt.NDArray[Any], feeds: Mapping[str, npt.NDArray[Any]], where: str) -> None:
    """What a token has beside its id: as many entries, masks any number, the rest integers."""
    ids = DECODER_IDS if name.startswith("decoder_") and DECODER_IDS in feeds else IDS
    if array.shape != feeds[ids].shape:
        raise UserError(
            f"{where}: {name} is {list(array.shape)}, but {ids} are {list(feeds[ids].shape)}",
            hint=f"store one {name} entry a token",
        )
    kinds, expected = ("biuf", "numbers") if name in (MASK, DECODER_MASK) else ("biu", "integers")
    if array.dtype.kind not in kinds:
        raise UserError(f"{where}: {name} is {array.dtype}, expected {expected}", hint=f"store {name} as {expected}")


def _rows_of_embeddings(model: Any) -> Mapping[str, int]:
    """How many rows of embeddings lie beside those of words, by the input that looks them up; few models have any."""
    words = model.get_input_embeddings()
    beside = next(module for module in model.modules() if any(child is words for child in module.children()))
    children = {name: child for name, child in beside.named_children() if isinstance(child, nn.Embedding)}
    return {name.replace("_embeddings", "_ids"): child.num_embeddings for name, child in children.items()}
