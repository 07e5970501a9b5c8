"""BERT for text classification with experts: https://arxiv.org/abs/1810.04805, upcycled as in 2212.05055.

Token-choice routing: the router is linear without bias, probabilities are a softmax over all E experts in float32, a
token goes to its K most probable experts, and their probabilities, divided by their sum, are the gates. So copies of
one feed-forward layer give what that layer gave, whatever the router says. Padding is routed like every token.

Axes beside those of ``moe_spec``: B texts, S tokens of one text, T = B * S.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertPreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from models.moe_bert.configuration import MoeBertConfig
from models.vmoe.modeling import VMoeExperts


@dataclasses.dataclass
class MoeBertClassifierOutput(SequenceClassifierOutput):
    """``SequenceClassifierOutput`` and the routers' balance loss, summed over MoE layers; None outside training."""

    aux_loss: Tensor | None = None


class MoeBertRouter(nn.Module):
    """Chooses K of E experts a token; gates sum to 1."""

    def __init__(self, config: MoeBertConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E) float32, gates (T, K) in the model's dtype, expert ids (T, K) int64."""
        logits_TE = functional.linear(hidden_TH.float(), self.weight.float())
        gates_TK, ids_TK = torch.topk(logits_TE.softmax(dim=-1), self.top_k, dim=-1)
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return logits_TE, gates_TK.to(hidden_TH.dtype), ids_TK


class MoeBertSparseMlp(nn.Module):
    """Router and experts in place of a dense feed-forward layer.

    Attributes:
        balance_loss: of the last forward pass in training mode; None after one outside of it.
    """

    def __init__(self, config: MoeBertConfig) -> None:
        super().__init__()
        self.router = MoeBertRouter(config)
        self.experts = VMoeExperts(config)
        self.balance_loss: Tensor | None = None

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """The experts' mix, (B, S, H)."""
        hidden_TH = hidden_BSH.flatten(0, 1)
        logits_TE, gates_TK, ids_TK = self.router(hidden_TH)
        self.balance_loss = self._balance_loss(logits_TE) if self.training else None
        mixed_BSH: Tensor = self.experts(hidden_TH, ids_TK, gates_TK).view_as(hidden_BSH)
        return mixed_BSH

    def _balance_loss(self, logits_TE: Tensor) -> Tensor:
        """That of https://arxiv.org/abs/2101.03961, 2.2."""
        return torch.as_tensor(load_balancing_loss_func((logits_TE,), self.router.num_experts, self.router.top_k))


class MoeBertPreTrainedModel(BertPreTrainedModel):  # type: ignore[no-untyped-call] # as MoeBertConfig
    """What transformers asks of every module tree with experts."""

    config_class = MoeBertConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Routers and experts small normal, biases zero; everything else as BERT."""
        if isinstance(module, MoeBertRouter | VMoeExperts):
            for name, parameter in module.named_parameters(recurse=False):
                init.normal_(parameter, std=0.0 if name.endswith("bias") else self.config.initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for the experts' decorator in the file of this class, but they come from another."""
        return True


class MoeBertModel(MoeBertPreTrainedModel, BertModel):  # type: ignore[no-untyped-call] # as MoeBertConfig
    """BERT without pooler, some layers with experts.

    A layer adds ``output.dense(intermediate(x))`` to ``x`` and normalises. Where it has experts, they are its
    ``intermediate``, and its ``output.dense`` is the identity; everything else is BERT's own.
    """

    def __init__(self, config: MoeBertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        for index in config.moe_layers:
            layer: Any = self.encoder.layer[index]
            layer.intermediate, layer.output.dense = MoeBertSparseMlp(config), nn.Identity()
        self.post_init()  # type: ignore[no-untyped-call]


class MoeBertForSequenceClassification(MoeBertPreTrainedModel):  # type: ignore[no-untyped-call] # as MoeBertConfig
    """BERT with experts, mean over the tokens that are no padding, linear classifier."""

    main_input_name = "input_ids"

    def __init__(self, config: MoeBertConfig) -> None:
        super().__init__(config)
        self.bert = MoeBertModel(config)
        assert config.num_labels is not None  # PreTrainedConfig counts id2label
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> MoeBertClassifierOutput:
        """Classify texts.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 where a token is padding.
            token_type_ids: (B, S) int64.
            position_ids: (B, S) int64.
            labels: (B,) int64 classes; asks for the loss.

        Returns:
            logits (B, num_labels); with ``labels`` the loss: cross-entropy, and in training mode the routers' balance
            losses times ``router_aux_loss_coef``.
        """
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.bert(input_ids, attention_mask=mask_BS, token_type_ids=token_type_ids, position_ids=position_ids)
        logits = self.classifier(mean_of_tokens(output.last_hidden_state, mask_BS))
        blocks = (module for module in self.modules() if isinstance(module, MoeBertSparseMlp))
        losses = [block.balance_loss for block in blocks if block.balance_loss is not None]
        total = torch.stack(losses).sum() if losses else None
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits, labels)
            loss = loss if total is None else loss + self.config.router_aux_loss_coef * total
        return MoeBertClassifierOutput(loss=loss, logits=logits, aux_loss=total)


def mean_of_tokens(hidden_BSH: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, H): as the sentence transformers of https://arxiv.org/abs/1908.10084 pool; padding is left out.

    >>> mean_of_tokens(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    weights_BS1 = mask_BS.to(hidden_BSH.dtype).unsqueeze(-1)
    return (hidden_BSH * weights_BS1).sum(dim=1) / weights_BS1.sum(dim=1)
