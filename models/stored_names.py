"""What the tensors of a checkpoint's files are called in the model: one a layer, or one an expert and projection."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from models.adapters import conversions_of
from models.tensor_files import AGAIN, StoredTensor
from moe_spec.errors import UserError

EXPERT_ID = re.compile(r"(?:(?<=\.experts\.)|(?<=\.experts\.expert_))\d+(?=\.)")
"""In the name of a tensor that holds one expert, e.g. ``mlp.experts.7.up_proj.weight`` or ``experts.expert_7.wi``."""


def parameter_names(skeleton: PreTrainedModel, tensors: Mapping[str, StoredTensor], directory: Path) -> dict[str, str]:
    """The parameter or buffer that each stored tensor goes to, whole or as a part; told by transformers' own loader.

    ``model.layers.0.block_sparse_moe.experts.3.w1.weight`` goes to ``model.layers.0.mlp.experts.gate_up_proj``. What
    goes nowhere is left out: transformers ignores it, as it does the layers of DeepSeek-V3 that predict further tokens.
    What is cut into several, see `is_cut`, goes to the first of them.

    Raises:
        UserError: stored tensors of ``directory`` leave a part of the model without values, or have too many for it.
    """
    parameters = skeleton.state_dict()
    transforms = conversions_of(skeleton)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names, together = {}, {}
    for stored in tensors:
        name, pattern = rename_source_key(stored, renamings, converters, skeleton.base_model_prefix, parameters)
        if name not in parameters and stored in parameters:  # so does transformers take back what it renamed
            name, pattern = stored, None
        if name in parameters:
            names[stored] = name
            together[name] = _filled_with(name, pattern, converters)
    _require_full(skeleton, tensors, names, together, directory)
    return names


def is_cut(model: PreTrainedModel) -> bool:
    """Whether transformers' loader cuts some stored tensor into several parameters, which `parameter_names` cannot say.

    Unlimited-OCR's vision tower is stored with queries, keys and values as one.
    """
    transforms = conversions_of(model)
    return any(
        isinstance(transform, WeightConverter) and len(transform.target_patterns) > 1 for transform in transforms
    )


def _filled_with(name: str, pattern: str | None, converters: Sequence[WeightConverter]) -> tuple[str, ...]:
    """All parameters that are cut from what goes to ``name``, by the converter whose ``pattern`` matched it."""
    targets = next((converter.target_patterns for converter in converters if pattern in converter.source_patterns), [])
    if len(targets) < 2:
        return (name,)
    before, _, after = name.partition(targets[0])
    return tuple(before + target + after for target in targets)


def _require_full(
    skeleton: PreTrainedModel,
    tensors: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    together: Mapping[str, Sequence[str]],
    directory: Path,
) -> None:
    values: Counter[str] = Counter()
    for stored, name in names.items():
        values[name] += tensors[stored].size
    tied: Mapping[str, str] = skeleton.all_tied_weights_keys
    there = {tied.get(name, name) for first in values for name in together[first]}
    parameters = skeleton.state_dict()
    lost = sorted(name for name in parameters if tied.get(name, name) not in there)
    if lost:
        raise UserError(
            f"{directory} lacks {len(lost)} weights that its config.json asks for, the first is {lost[0]!r}",
            hint=AGAIN,
        )
    for name, found in values.items():
        wanted = sum(parameters[one].numel() for one in together[name] if one in parameters)
        if found != wanted:
            raise UserError(
                f"{directory} has {found:,} values for {name!r}, its config.json asks for {wanted:,}",
                hint="config.json and the weights must describe the same model; get the checkpoint again",
            )
