"""Train a copy of a dense BERT's upper layers on each domain, and mix their feed-forward layers as experts.

After Branch-Train-MiX, https://arxiv.org/abs/2403.07816: experts that come from different data differ, where copies of
one layer that are trained together hardly do. There, branches are whole models and what is no expert is averaged; here
a branch trains its feed-forward layers only, beside a classifier that it throws away.

The layers below the first experts are never trained: they run once, and all training starts from what they give. Matrix
products are in bfloat16; weights stay float32.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from benchmarks.tasks.training import Phase, Report, bfloat16, endless, train
from models.moe_bert.modeling import MoeBertForSequenceClassification, MoeBertSparseMlp, mean_of_tokens
from models.moe_layers import find_moe_layers

TRUNK_BATCH = 50


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What the layers below the first experts make of examples.

    Attributes:
        layers: how many they are.
        hidden_NSH: what they give, in half precision.
        mask_NS: 0 where a token is padding.
        labels_N: int64.
        experts_N: the expert of each example's domain.
    """

    layers: int
    hidden_NSH: Tensor
    mask_NS: Tensor
    labels_N: Tensor
    experts_N: Tensor

    def only(self, labels: Sequence[int]) -> "Trunk":
        """The examples with these labels, which become 0, 1, ... in the order given; they share their only expert."""
        is_label_NC = self.labels_N[:, None] == torch.tensor(labels)
        taken = is_label_NC.any(dim=1)
        labels_M = is_label_NC[taken].int().argmax(dim=1)
        experts_M = torch.zeros_like(labels_M)
        return Trunk(self.layers, self.hidden_NSH[taken], self.mask_NS[taken], labels_M, experts_M)


@torch.inference_mode()
def run_trunk(
    dense: BertModel, layers: int, ids_NS: Tensor, mask_NS: Tensor, labels_N: Tensor, experts_N: Tensor
) -> Trunk:
    """Run embeddings and the first ``layers`` layers of ``dense``, which is in eval mode, on every example."""
    with bfloat16():
        hidden = [
            _run_layers(dense.encoder.layer[:layers], dense.embeddings(input_ids=ids_BS), mask_BS).half()
            for ids_BS, mask_BS in zip(torch.split(ids_NS, TRUNK_BATCH), torch.split(mask_NS, TRUNK_BATCH), strict=True)
        ]
    return Trunk(layers, torch.cat(hidden), mask_NS, labels_N, experts_N)


def classify(model: MoeBertForSequenceClassification, layers: int, hidden_BSH: Tensor, mask_BS: Tensor) -> Tensor:
    """Logits (B, C) of ``model`` from what its first ``layers`` layers give."""
    hidden_BSH = _run_layers(model.bert.encoder.layer[layers:], hidden_BSH.float(), mask_BS)
    logits_BC: Tensor = model.classifier(mean_of_tokens(hidden_BSH, mask_BS))
    return logits_BC


def train_experts(
    model: MoeBertForSequenceClassification, trunk: Trunk, phase: Phase, generator: np.random.Generator, report: Report
) -> None:
    """Train the experts of ``model`` and its classifier; everything else stays as it is."""
    experts = [layer.experts.parameters() for layer in find_moe_layers(model)]
    _fit(model, trunk, [*itertools.chain(*experts), *model.classifier.parameters()], phase, generator, report)


def train_all_but_experts(
    model: MoeBertForSequenceClassification, trunk: Trunk, phase: Phase, generator: np.random.Generator, report: Report
) -> None:
    """Train all above the trunk that is no expert: routers, attention, LayerNorms, classifier."""
    experts = {id(parameter) for layer in find_moe_layers(model) for parameter in layer.experts.parameters()}
    above = [*model.bert.encoder.layer[trunk.layers :].parameters(), *model.classifier.parameters()]
    _fit(model, trunk, [parameter for parameter in above if id(parameter) not in experts], phase, generator, report)


def mix(branches: Iterable[MoeBertForSequenceClassification], model: MoeBertForSequenceClassification) -> None:
    """Let expert ``e`` of every MoE layer of ``model`` be the only expert of branch ``e`` there."""
    of_branches = [find_moe_layers(branch) for branch in branches]
    with torch.no_grad():
        for index, layer in enumerate(find_moe_layers(model)):
            for name, parameter in layer.experts.named_parameters():
                parameter.copy_(torch.cat([getattr(layers[index].experts, name) for layers in of_branches]))


@contextlib.contextmanager
def _router_logits(sparse: Iterable[MoeBertSparseMlp]) -> Iterator[list[Tensor]]:
    """Is filled with the (T, E) logits of every router, in the order in which they run."""
    routed: list[Tensor] = []
    hooks = [block.router.register_forward_hook(lambda *call: routed.append(call[-1][0])) for block in sparse]
    try:
        yield routed
    finally:
        for hook in hooks:
            hook.remove()


def _run_layers(layers: Iterable[nn.Module], hidden_BSH: Tensor, mask_BS: Tensor) -> Tensor:
    for layer in layers:
        hidden_BSH = layer(hidden_BSH, mask_BS[:, None, None].bool())
    return hidden_BSH


def _fit(
    model: MoeBertForSequenceClassification,
    trunk: Trunk,
    learned: Sequence[nn.Parameter],
    phase: Phase,
    generator: np.random.Generator,
    report: Report,
) -> None:
    """Train ``learned`` in place."""
    order = endless(len(trunk.labels_N), generator)
    sparse = [module for module in model.modules() if isinstance(module, MoeBertSparseMlp)]

    def losses() -> tuple[Tensor, Tensor]:
        ids = list(itertools.islice(order, phase.batch_size))
        mask_BS = trunk.mask_NS[ids]
        is_token_T = mask_BS.flatten() != 0
        with bfloat16(), _router_logits(sparse) as routed:
            logits_BC = classify(model, trunk.layers, trunk.hidden_NSH[ids], mask_BS).float()
        entropy = functional.cross_entropy(logits_BC, trunk.labels_N[ids])
        balance = sum(block.balance_loss for block in sparse if block.balance_loss is not None)
        expert_T = trunk.experts_N[ids].repeat_interleave(mask_BS.shape[1])[is_token_T]
        guide = sum(functional.cross_entropy(logits_TE[is_token_T].float(), expert_T) for logits_TE in routed)
        return entropy + phase.balance * balance + phase.guide * guide, entropy

    train(model, learned, losses, phase, report)
