"""What training changes in a model's settings for its own time only."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

_BALANCE = ("router_aux_loss_coef", "aux_loss_coef")
"""What the weight of the balance loss is called; the second by JetMoE."""

_MISSING = object()


@contextlib.contextmanager
def without_balance_loss(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's own loss has no share of its auxiliary one.

    That one makes routers use all experts alike, and would call back what is pruned.
    """
    weights = [(holder, name) for holder in (model.config, model) for name in _BALANCE if hasattr(holder, name)]
    with contextlib.ExitStack() as stack:
        for holder, name in weights:
            stack.enter_context(restored(holder, name))
            setattr(holder, name, 0.0)
        yield


@contextlib.contextmanager
def restored(holder: object, name: str) -> Iterator[None]:
    """After the block attribute ``name`` of ``holder`` is what it was before, or is not there again."""
    before = vars(holder).get(name, _MISSING)
    try:
        yield
    finally:
        if before is not _MISSING:
            setattr(holder, name, before)
        elif name in vars(holder):
            delattr(holder, name)
