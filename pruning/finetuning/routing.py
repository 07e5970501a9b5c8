"""See what routers give while a model trains, with gradients."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.families import family_of
from models.moe_layers import find_moe_layers, require_token_choice
from pruning.inputs import valid_tokens
from pruning.observe import logits_of


@dataclasses.dataclass(frozen=True)
class Routing:
    """What one router gave in one forward pass, for the T tokens that are no padding.

    Attributes:
        logits_TE: (T, E) float, part of the graph; their softmax, or whatever `MoELayer.score` is, are the scores.
        gates_TK: (T, K) float, what multiplies the outputs of the selected experts.
        ids_TK: (T, K) int64, the selected experts.
    """

    logits_TE: Tensor
    gates_TK: Tensor
    ids_TK: Tensor


@contextlib.contextmanager
def watched(model: PreTrainedModel, observer: Callable[[str, Routing], None]) -> Iterator[None]:
    """Within the block ``observer`` is told the name of each MoE layer that runs, and its `Routing`.

    Raises:
        UserError: a layer whose experts choose their tokens.
    """
    layers, row = find_moe_layers(model), family_of(model.config)
    require_token_choice(layers)
    batch: dict[str, Any] = {}

    def before(_model: nn.Module, _arguments: Any, keywords: Mapping[str, Any]) -> None:
        batch.clear()
        batch.update(keywords)

    def after(name: str) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], None]:
        def hook(_router: nn.Module, _arguments: Any, answer: tuple[Tensor, ...]) -> None:
            first_TE, gates_TK, ids_TK, *_ = answer  # of every router of `models.families`
            seen, real_T = (logits_of(row, first_TE), gates_TK, ids_TK), valid_tokens(batch, name)
            observer(name, Routing(*(seen if real_T is None else (values[real_T] for values in seen))))

        return hook

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.router.register_forward_hook(after(layer.name)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
