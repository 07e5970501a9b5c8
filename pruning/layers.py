"""What a plan needs to know of a model: its identity, and the counts of its MoE layers."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_spec.feasibility import Groups

if TYPE_CHECKING:
    from models.moe_layers import MoELayer


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One MoE layer: its path, E, K, its group-limited routing, if it has one, and whether experts choose tokens."""

    name: str
    experts: int
    top_k: int
    groups: Groups | None
    expert_choice: bool = False


@dataclasses.dataclass(frozen=True)
class ModelLayers:
    """The MoE layers of one model, in model order, and the hash that its plans carry."""

    model_sha256: str
    layers: tuple[LayerShape, ...]


def of_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> ModelLayers:
    """The layers of a transformers checkpoint; its weights are not read.

    Raises:
        UserError: no checkpoint, or one of no known family.
    """
    # torch takes seconds to import, and plans for statistics or ONNX models need none
    from models.checkpoints import load_skeleton
    from models.moe_layers import find_moe_layers
    from moe_spec.identity import checkpoint_sha256

    layers = find_moe_layers(load_skeleton(directory, trust_remote_code=trust_remote_code))
    return ModelLayers(checkpoint_sha256(directory), shapes_of(layers))


def shapes_of(layers: Iterable["MoELayer"]) -> tuple[LayerShape, ...]:
    """What a plan needs to know of the MoE layers of a torch model."""
    return tuple(
        LayerShape(layer.name, layer.num_experts, layer.top_k, layer.groups, layer.expert_choice) for layer in layers
    )
