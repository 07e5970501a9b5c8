"""What a V-MoE gets right, and how its routers share the work."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.vmoe.modeling import VMoeForImageClassification, VMoeRouter


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result on labelled images.

    Attributes:
        correct: (N,) bool, whether the most probable class is the label.
        expert_load: per MoE layer, by the layer's name, the share (E) of the T * K selections that each expert got.
    """

    correct: Tensor
    expert_load: dict[str, list[float]]

    @property
    def accuracy(self) -> float:
        """Share of images classified correctly."""
        return self.correct.double().mean().item()


@torch.inference_mode()
def evaluate(
    model: VMoeForImageClassification, pixel_values: Tensor, labels: Tensor, batch_size: int = 500
) -> Evaluation:
    """Run ``model`` in eval mode over (N, C, S, S) float images with (N,) int64 labels."""
    model.train(False)
    routers = {name: module for name, module in model.named_modules() if isinstance(module, VMoeRouter)}
    counts = {name: torch.zeros(router.num_experts, dtype=torch.int64) for name, router in routers.items()}
    hooks = [router.register_forward_hook(_count_into(counts[name])) for name, router in routers.items()]
    try:
        batches = torch.split(pixel_values, batch_size)
        predicted = torch.cat([model(batch).logits.argmax(dim=-1) for batch in batches])
    finally:
        for hook in hooks:
            hook.remove()
    load = {name.removesuffix(".router"): (count / count.sum()).tolist() for name, count in counts.items()}
    return Evaluation(predicted == labels, load)


def _count_into(count_E: Tensor) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor, Tensor]], None]:
    def hook(_router: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        count_E.add_(torch.bincount(outputs[2].flatten(), minlength=len(count_E)))

    return hook
