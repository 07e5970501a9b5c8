"""How weights are trained: optimizer, schedule and seed. Needs no torch."""

import dataclasses
import math
from collections.abc import Mapping

from moe_spec.errors import require_known
from pruning.finetuning.flags import require

ADAMW, SGD = OPTIMIZERS = ("adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the weights are trained: linear warm-up, then half a cosine.

    Attributes:
        optimizer: ``adamw`` or ``sgd``, as of `OPTIMIZERS`.
        steps: optimizer steps, T.
        learning_rate: at the end of the warm-up.
        final_learning_rate: at the end, if that is less.
        warmup: share of the steps, so that a shorter run keeps the shape of a longer one.
        batch_size: examples a step.
        max_grad_norm: longer gradients (all of them together) are scaled to it.
        momentum: of ``sgd``; ``adamw`` has moments of its own.
        weight_decay: of matrices; biases and norms are not decayed.
        seed: of shuffling, and of what the model draws while it trains.
    """

    optimizer: str
    steps: int
    learning_rate: float
    final_learning_rate: float
    warmup: float
    batch_size: int
    max_grad_norm: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_known(self.optimizer, "optimizer", OPTIMIZERS)
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0")
        require(0 <= self.final_learning_rate < math.inf, "final_learning_rate", self.final_learning_rate, "0 or more")
        require(0 <= self.warmup <= 1, "warmup", self.warmup, "a share from 0 to 1")
        require(0 < self.max_grad_norm < math.inf, "max_grad_norm", self.max_grad_norm, "above 0 and finite")
        most, expected = (1, "from 0, below 1") if self.optimizer == SGD else (math.ulp(0), "0, for adamw takes none")
        require(0 <= self.momentum < most, "momentum", self.momentum, expected)
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")


_ROUTER_NORM = Recipe(
    SGD,
    steps=1000,
    learning_rate=1.5e-3,
    final_learning_rate=1e-5,
    warmup=0.1,
    batch_size=512,
    max_grad_norm=10.0,
    momentum=0.9,
)

RECIPES: Mapping[str, Recipe] = {
    "adamw": Recipe(
        ADAMW,
        steps=1000,
        learning_rate=1e-4,
        final_learning_rate=0.0,
        warmup=0.1,
        batch_size=32,
        max_grad_norm=1.0,
        weight_decay=0.01,
    ),
    "router-norm-cifar": _ROUTER_NORM,
    "router-norm-imagenet": dataclasses.replace(_ROUTER_NORM, learning_rate=9.375e-5, warmup=0.5, batch_size=32),
}
"""``router-norm-*`` is how https://arxiv.org/abs/2405.16646 fine-tunes pruned V-MoEs: the defaults of the authors' code
for CIFAR-10 and CIFAR-100 (100 steps of warm-up of 1000), and its example for ImageNet (500 of 1000). The loss is plain
cross-entropy. ``adamw`` is everybody's."""


def recipe(name: str) -> Recipe:
    """The recipe called ``name``; `dataclasses.replace` changes what it says.

    Raises:
        UserError: there is none.

    >>> recipe("router-norm-imagenet").learning_rate
    9.375e-05
    """
    require_known(name, "recipe", RECIPES)
    return RECIPES[name]
