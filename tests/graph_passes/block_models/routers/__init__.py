"""From the hidden states to K ids and K weights a token, with the ops that exporters write."""

from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.routers import argmax, sparsemixer, topk
from tests.graph_passes.block_models.routers.scoring import Slots

SLOTS = {
    "topk": topk.slots,
    "argmax": argmax.slots_of_one,
    "two_argmax": argmax.slots_of_two,
    "sparsemixer": sparsemixer.slots,
}


def slots(block: Block) -> Slots:
    """The weights in the model's type unless ``weights_float``."""
    routed = SLOTS[block.spec.selection](block)
    return routed if block.spec.weights_float else routed._replace(weights=torch.to_model(block.b, routed.weights))
