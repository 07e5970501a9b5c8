"""Merged experts in files: under the names and in the layout of the checkpoint that they are made of."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from models.adapters import adapted
from models.checkpoints import FLOATS
from models.moe_layers import tensors_by_expert
from models.stored_merges import StoredMerges
from models.stored_names import EXPERT_ID
from models.tensor_files import StoredTensor, read_tensors


def are_saved_as_stored(
    skeleton: PreTrainedModel, merges: StoredMerges, tensors: Mapping[str, StoredTensor], names: Mapping[str, str]
) -> bool:
    """Whether transformers would save what is merged as it lies in the checkpoint, and float32 holds it.

    Args:
        skeleton: the model, after the plan.
        merges: of that plan.
        tensors: those of the checkpoint, by their names in its files.
        names: the parameter that each of them goes to.
    """
    parameters = skeleton.state_dict()
    for layer in merges.parameters:
        first = {name: parameters[name][:1].to("meta") for name in layer}
        saved = _as_saved(skeleton, first)
        if any(names.get(stored) not in first or tensors[stored].dtype == "F64" for stored in saved):
            return False
    return True


def merged_tensors(
    skeleton: PreTrainedModel,
    merges: StoredMerges,
    tensors: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    scratch: Path,
) -> dict[str, StoredTensor]:
    """Write merged experts to files in ``scratch``, one after the other, and the routers of their model.

    Args:
        skeleton: the model, after the plan; its routers have values.
        merges: of that plan.
        tensors: those of the checkpoint, by their names in its files.
        names: the parameter that each of them goes to.
        scratch: a directory that is there until the result was written elsewhere.

    Returns:
        The tensors by their names in a checkpoint; nothing where nothing is merged.
    """
    dtypes = {name: FLOATS[tensors[stored].dtype] for stored, name in names.items() if tensors[stored].dtype in FLOATS}
    parts: dict[str, list[StoredTensor]] = defaultdict(list)
    for count, (expert, values) in enumerate(_values(skeleton, merges, dtypes)):
        path = scratch / f"{count}.safetensors"
        save_file({name: value.contiguous() for name, value in _as_saved(skeleton, values).items()}, path)
        for name, tensor in read_tensors(path).items():
            parts[EXPERT_ID.sub(str(expert), name)].append(tensor)
    return {name: _joined(rows) for name, rows in parts.items()}


def _values(
    skeleton: PreTrainedModel, merges: StoredMerges, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The new id of each merged expert and its parameters (1, ...); then the rows of the routers."""
    for layer in merges.parameters:
        pieces = (merges.pieces(name, dtypes[name]) for name in layer)
        for expert, values in enumerate(zip(*pieces, strict=True)):
            yield expert, dict(zip(layer, values, strict=True))
    if merges.parameters:
        filled = {name for name in tensors_by_expert(skeleton) if not skeleton.state_dict()[name].is_meta}
        yield 0, {name: skeleton.state_dict()[name].to(dtypes[name]) for name in sorted(filled)}


def _as_saved(skeleton: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    with adapted(skeleton.config.model_type):
        saved: dict[str, Tensor] = revert_weight_conversion(skeleton, values)
    return saved


def _joined(rows: list[StoredTensor]) -> StoredTensor:
    """Tensors that lie one behind the other on axis 0."""
    length = sum(tensor.shape[0] for tensor in rows)
    spans = tuple(span for tensor in rows for span in tensor.spans)
    return StoredTensor(rows[0].dtype, (length, *rows[0].shape[1:]), spans)
