"""Train a model in place with transformers' Trainer: nothing on disk, no network, the same result for the same seed."""

import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from moe_spec.errors import UserError
from moe_spec.progress import Progress, silent
from pruning.finetuning.examples import Inputs
from pruning.finetuning.objectives import Objective
from pruning.finetuning.recipe import ADAMW, SGD, Recipe
from pruning.finetuning.temporary import restored, without_balance_loss

AfterStep = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


def train(
    model: PreTrainedModel,
    examples: Inputs,
    objective: Objective,
    recipe: Recipe,
    *,
    callbacks: Iterable[TrainerCallback] = (),
    after_step: Iterable[AfterStep] = (),
    on_progress: Progress = silent,
) -> list[float]:
    """Train ``model`` in place, on one GPU where there is any; it ends in eval mode on the CPU.

    Parameters that need no gradient stay as they are.

    Args:
        model: in float32.
        examples: inputs, and labels where ``objective`` needs them.
        objective: the loss of a batch. The model's auxiliary losses are off: nothing balances the experts.
        recipe: optimizer, schedule and seed. The seed becomes that of torch, numpy and random.
        callbacks: told of every step.
        after_step: called after every step, with the steps done and the steps in all.
        on_progress: told after every step.

    Returns:
        The loss of every step.

    Raises:
        UserError: the loss of a step is infinite or no number.
    """
    losses: list[float] = []
    acts: list[AfterStep] = [*after_step, functools.partial(on_progress, "training")]
    # the Trainer wants a directory, and turns the cache of generation off for good
    with tempfile.TemporaryDirectory() as nowhere, without_balance_loss(model), restored(model.config, "use_cache"):
        trainer = _Trainer(
            model=model,
            args=_arguments(recipe, nowhere),
            train_dataset=_Examples(examples),
            callbacks=[*callbacks, _AfterStep(acts)],
            optimizer_cls_and_kwargs=_optimizer(recipe),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.objective, trainer.losses = objective, losses
        trainer.train()
    model.cpu().train(False)
    return losses


def _arguments(recipe: Recipe, directory: str) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": min(recipe.final_learning_rate, recipe.learning_rate)},
        warmup_steps=round(recipe.warmup * recipe.steps),
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # on several GPUs the Trainer trains replicas, with a batch each, and our hooks are on the original; it does this
    # itself for a model that is spread over them
    arguments._n_gpu = 1
    return arguments


def _optimizer(recipe: Recipe) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        ADAMW: (torch.optim.AdamW, {}),
        SGD: (torch.optim.SGD, {"momentum": recipe.momentum}),
    }
    kind, options = kinds[recipe.optimizer]
    return kind, {"lr": recipe.learning_rate, **options}


class _AfterStep(TrainerCallback):
    """Calls each of ``acts`` after every step; one callback for all, for the Trainer warns of two of a kind."""

    def __init__(self, acts: Sequence[AfterStep]) -> None:
        self._acts = acts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 # the Trainer's names
        """Called by the Trainer."""
        for act in self._acts:
            act(state.global_step, state.max_steps)


class _Trainer(Trainer):
    """Minimises `objective` and keeps the losses."""

    objective: Objective
    losses: list[float]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor | Any], *_: Any, **__: Any) -> Tensor:
        """What the Trainer calls for every batch.

        Raises:
            UserError: the loss is infinite or no number; whatever is learned from it is neither.
        """
        loss = self.objective(model, inputs)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss of step {len(self.losses) + 1} is {value}", hint="give a lower --learning-rate")
        self.losses.append(value)
        return loss


class _Examples(Dataset[Inputs]):
    def __init__(self, columns: Inputs) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int) -> Inputs:
        return {name: column[index] for name, column in self._columns.items()}
