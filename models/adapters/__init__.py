"""Families whose blocks are none of transformers' experts interface, or not what was trained, and what replaces them.

An adapter is a function ``block -> module`` for a class of blocks. Within `adapted` every new model of its family gets
the module instead, before weights are loaded, so whatever finds, ranks, prunes or exports layers sees standard parts.
What the family's files call its weights stays: transformers' own loader, and so `prune`, is told by ``conversions``
where each goes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightTransform

from models.adapters import dbrx, jetmoe, llama4, nemotron_h, step3p7, switch_transformers
from models.families import family, is_known
from models.moe_block import StackedExperts

Blocks = Mapping[str, Callable[[Any], nn.Module]]
"""By the name of a class of modules: what is put in the place of each of them."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How blocks of one family become standard ones.

    Attributes:
        blocks: by the name of a class, what replaces each module of it; weights may be on torch's meta device.
        conversions: from the names in the family's files to those of the new module; None where transformers knows.
    """

    blocks: Blocks
    conversions: Callable[[], list[WeightTransform]] | None = None


ADAPTERS: Mapping[str, Adapter] = {
    "dbrx": Adapter({"DbrxFFN": dbrx.adapt}, dbrx.conversions),
    "jetmoe": Adapter({"JetMoeMoE": jetmoe.JetMoeMoe, "JetMoeMoA": jetmoe.JetMoeStaticAttention}, jetmoe.conversions),
    "llama4": Adapter({"Llama4TextMoe": llama4.Llama4Moe}),
    "nemotron_h": Adapter({"NemotronHMamba2Mixer": nemotron_h.adapt}),
    "step3p7": Adapter({"Step3p7Experts": step3p7.adapt}),
    "switch_transformers": Adapter(
        {"SwitchTransformersSparseMLP": switch_transformers.SwitchMoe}, switch_transformers.conversions
    ),
}
"""By ``model_type`` of the family. One line and one file a family."""


@contextlib.contextmanager
def adapted(model_type: str) -> Iterator[None]:
    """Within the block models of this type are built from standard MoE blocks, loaded and saved as such.

    transformers' own classes and its registry of conversions are as before afterwards.
    """
    adapter = ADAPTERS.get(family(model_type).model_type) if is_known(model_type) else None
    if adapter is None:
        yield
        return
    with _replacing(adapter), _converting(model_type, adapter):
        yield


def conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """How the names in a checkpoint's files become those of ``model``, built here: transformers' words and ours."""
    with adapted(model.config.model_type):
        transforms: list[WeightTransform] = conversion_mapping.get_model_conversion_mapping(model)
    return transforms


def replace_blocks(model: PreTrainedModel, blocks: Blocks) -> None:
    """Replace what ``blocks`` has something for; the model's config says from now on which experts function runs."""
    for name, block in list(model.named_modules()):
        if type(block).__name__ in blocks:
            model.set_submodule(name, blocks[type(block).__name__](block))
    for module in model.modules():
        if isinstance(module, StackedExperts):
            module.config = model.config  # of the outermost model: encoder and decoder have copies
    vars(model)["_can_set_experts_implementation"] = lets_experts_be_chosen


def lets_experts_be_chosen() -> bool:
    """For ``model._can_set_experts_implementation``: transformers looks for a decorator in the model's own file."""
    return True


@contextlib.contextmanager
def _replacing(adapter: Adapter) -> Iterator[None]:
    """Transformers calls ``post_init`` when all modules of a model are there, and loads weights into them later."""
    models: Any = PreTrainedModel
    original = models.post_init

    def post_init(model: PreTrainedModel) -> None:
        original(model)
        replace_blocks(model, adapter.blocks)

    models.post_init = post_init
    try:
        yield
    finally:
        models.post_init = original


@contextlib.contextmanager
def _converting(model_type: str, adapter: Adapter) -> Iterator[None]:
    """``register_checkpoint_conversion_mapping`` has no way back, and a model of transformers' own needs one."""
    if adapter.conversions is None:
        yield
        return
    mapping: Any = conversion_mapping  # untyped
    mapping.get_checkpoint_conversion_mapping(model_type)  # fills the registry
    registry: dict[str, list[WeightTransform]] = mapping._checkpoint_conversion_mapping_cache
    assert model_type not in registry, "transformers knows conversions of its own, which these would replace"
    registry[model_type] = adapter.conversions()
    try:
        yield
    finally:
        del registry[model_type]
