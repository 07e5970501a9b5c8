"""What a plan needs to know of a model: its identity, and the counts of its MoE layers."""

import dataclasses
from pathlib import Path

from moe_spec.feasibility import Groups


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One MoE layer: its path, E, K, and its group-limited routing, if it has one."""

    name: str
    experts: int
    top_k: int
    groups: Groups | None


@dataclasses.dataclass(frozen=True)
class ModelLayers:
    """The MoE layers of one model, in model order, and the hash that its plans carry."""

    model_sha256: str
    layers: tuple[LayerShape, ...]


def of_checkpoint(directory: Path) -> ModelLayers:
    """The layers of a transformers checkpoint; its weights are not read.

    Raises:
        UserError: no checkpoint, or one of no known family.
    """
    # torch takes seconds to import, and plans for statistics or ONNX models need none
    from models.checkpoints import load_skeleton
    from models.moe_layers import find_moe_layers
    from moe_spec.identity import checkpoint_sha256

    layers = find_moe_layers(load_skeleton(directory))
    shapes = tuple(LayerShape(layer.name, layer.num_experts, layer.top_k, layer.groups) for layer in layers)
    return ModelLayers(checkpoint_sha256(directory), shapes)
