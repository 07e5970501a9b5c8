"""V-MoE for image classification: https://arxiv.org/abs/2106.05974 with the routing of google-research/vmoe.

Token-choice routing: the router is linear without bias, probabilities are a softmax over all E experts in float32, a
token goes to its K most probable experts, and their probabilities are the gates as they are, never renormalised.
No token is dropped: this is V-MoE with an unbounded capacity ratio, so no expert has a buffer that could overflow.

An ensemble E3 (https://arxiv.org/abs/2110.03360) of M members computes every image M times from its first block with
experts on. In these blocks a member has a router and experts of its own, elsewhere members share all weights. So each
member's part of a block is a MoE layer like any other: whatever ranks, prunes or exports layers does so a member.

Expert choice (https://arxiv.org/abs/2202.09368) turns it around: the probabilities are the same, and every expert takes
the C tokens of an image for which it is most probable. A token may get several experts, or none. google-research/vmoe
chooses among the tokens of a group of images, and rounds C up to a multiple of 4; here a group is one image, so that
what is said of it does not depend on others in the batch, and C is what the factor says.

Axes beside those of ``moe_spec``: B images (those of one member after those of another), P tokens of one image,
T = B * P, M members, C classes or capacity.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import ImageClassifierOutput

from models.vmoe.configuration import EXPERT_CHOICE, VMoeConfig
from models.vmoe.losses import auxiliary_loss


@dataclasses.dataclass
class VMoeImageClassifierOutput(ImageClassifierOutput):
    """``ImageClassifierOutput`` and the routers' auxiliary loss, summed over MoE layers; None outside training."""

    aux_loss: Tensor | None = None


class VMoeStem(nn.Module):
    """Convolutions that each halve the image, then learned position embeddings."""

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(_convolutions(config))
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.class_token else None
        self.act_fn = ACT2FN[config.hidden_act]
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_patches, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, S, S) to (B, P, H)."""
        hidden = self.convolutions[0](pixel_values)
        for convolution in self.convolutions[1:]:
            hidden = convolution(self.act_fn(hidden))
        tokens_BPH: Tensor = hidden.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens_BPH = torch.cat((self.class_token.expand(len(tokens_BPH), -1, -1), tokens_BPH), dim=1)
        return tokens_BPH + self.position_embeddings


def _convolutions(config: VMoeConfig) -> Iterator[nn.Conv2d]:
    if config.patch_size is not None:
        yield nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        return
    widths = [config.num_channels, *config.stem_channels, config.hidden_size]
    for before, after in itertools.pairwise(widths):
        yield nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)


class VMoeSelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of one image."""

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BPH: Tensor) -> Tensor:
        """(B, P, H) to (B, P, H)."""
        heads = self.qkv_proj(hidden_BPH).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class VMoeMlp(nn.Module):
    """The dense MLP of the blocks without experts."""

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_BPH: Tensor) -> tuple[Tensor, None]:
        """(B, P, H) to (B, P, H), and no auxiliary loss."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_BPH))), None


class VMoeRouter(nn.Module):
    """Chooses K of E experts a token; in training, normal noise of standard deviation 1/E is added to the logits."""

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E) float32 that top-k saw, gates (T, K) in the model's dtype, expert ids (T, K) int64."""
        logits_TE = self.logits(hidden_TH)
        if self.training:
            logits_TE = logits_TE + torch.randn_like(logits_TE) * self.noise_std
        gates_TK, ids_TK = torch.topk(logits_TE.softmax(dim=-1), self.top_k, dim=-1)
        return logits_TE, gates_TK.to(hidden_TH.dtype), ids_TK

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits (T, E) float32 without noise."""
        return functional.linear(hidden_TH.float(), self.weight.float())

    @property
    def noise_std(self) -> float:
        """Standard deviation of the training noise."""
        return 1 / self.num_experts


class ExpertsConfig(Protocol):
    """What of a configuration the experts look at."""

    num_experts: int
    intermediate_size: int
    hidden_size: int
    hidden_act: str


@use_experts_implementation(has_gate=False, has_bias=True)
class VMoeExperts(nn.Module):
    """E two-layer MLPs with biases, as stacked weights. transformers' experts interface may replace ``forward``."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        E, F, H = config.num_experts, config.intermediate_size, config.hidden_size
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, F, H))
        self.up_proj_bias = nn.Parameter(torch.empty(E, F))
        self.down_proj = nn.Parameter(torch.empty(E, H, F))
        self.down_proj_bias = nn.Parameter(torch.empty(E, H))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """``y_t = sum_k gates_tk f_{ids_tk}(x_t)``, (T, H): one expert after the other on the tokens it was given."""
        output_TH = torch.zeros_like(hidden_TH)
        for expert in torch.unique(ids_TK).tolist():
            token, choice = torch.where(ids_TK == expert)
            up = functional.linear(hidden_TH[token], self.up_proj[expert], self.up_proj_bias[expert])
            down = functional.linear(self.act_fn(up), self.down_proj[expert], self.down_proj_bias[expert])
            output_TH.index_add_(0, token, down * gates_TK[token, choice, None])
        return output_TH


class VMoeSparseMlp(nn.Module):
    """Router and experts in place of the dense MLP."""

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__()
        self.router = VMoeRouter(config)
        self.experts = VMoeExperts(config)

    def forward(self, hidden_BPH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts' mix (B, P, H), and in training the auxiliary loss of this layer."""
        hidden_TH = hidden_BPH.flatten(0, 1)
        logits_TE, gates_TK, ids_TK = self.router(hidden_TH)
        mixed_BPH = self.experts(hidden_TH, ids_TK, gates_TK).view_as(hidden_BPH)
        if not self.training:
            return mixed_BPH, None
        router = self.router
        # the load loss needs the logits without their noise: one small product again, instead of state on the router
        return mixed_BPH, auxiliary_loss(router.logits(hidden_TH), logits_TE, router.noise_std, router.top_k)


class VMoeExpertChoiceRouter(VMoeRouter):
    """Chooses C tokens of each image for every expert."""

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__(config)
        assert config.expert_capacity is not None  # settled by the configuration
        self.capacity = config.expert_capacity

    def forward(self, hidden_BPH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, P, E) float32, gates (B, E, C) in the model's dtype, the image's tokens (B, E, C) int64."""
        logits_BPE = self.logits(hidden_BPH)
        if self.training:
            logits_BPE = logits_BPE + torch.randn_like(logits_BPE) * self.noise_std
        gates_BEC, tokens_BEC = torch.topk(logits_BPE.softmax(dim=-1).transpose(1, 2), self.capacity, dim=-1)
        return logits_BPE, gates_BEC.to(hidden_BPH.dtype), tokens_BEC


class VMoeExpertChoiceExperts(VMoeExperts):
    """The same experts, each on as many tokens: two batched products."""

    def forward(self, taken_BECH: Tensor) -> Tensor:  # type: ignore[override] # the tokens are sorted already
        """``f_e`` of the tokens that expert e took, (B, E, C, H)."""
        tokens_ENH = taken_BECH.transpose(0, 1).flatten(1, 2)
        up_ENF = tokens_ENH @ self.up_proj.transpose(1, 2) + self.up_proj_bias[:, None]
        down_ENH = self.act_fn(up_ENF) @ self.down_proj.transpose(1, 2) + self.down_proj_bias[:, None]
        given_BECH: Tensor = down_ENH.reshape(len(down_ENH), -1, *taken_BECH.shape[2:]).transpose(0, 1)
        return given_BECH


class VMoeExpertChoiceMlp(nn.Module):
    """As `VMoeSparseMlp`, where experts choose. All of them have the same load, so there is nothing to balance."""

    expert_choice = True

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__()
        self.router = VMoeExpertChoiceRouter(config)
        self.experts = VMoeExpertChoiceExperts(config)

    def forward(self, hidden_BPH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts' mix (B, P, H), 0 for a token that no expert took; in training an auxiliary loss of 0."""
        _, gates_BEC, tokens_BEC = self.router(hidden_BPH)
        tokens_BN, gates_BN = tokens_BEC.flatten(1), gates_BEC.flatten(1)
        index_BNH = tokens_BN[..., None].expand(-1, -1, hidden_BPH.shape[-1])
        taken_BECH = hidden_BPH.gather(1, index_BNH).reshape(*tokens_BEC.shape, -1)
        given_BNH = self.experts(taken_BECH).flatten(1, 2)
        # a product, as google-research/vmoe does it: TensorRT scatters, but does not add what meets
        ids_P1 = torch.arange(hidden_BPH.shape[1], device=hidden_BPH.device)[:, None]
        weights_BPN = torch.where(tokens_BN[:, None] == ids_P1, gates_BN[:, None], 0.0)
        return weights_BPN @ given_BNH, hidden_BPH.new_zeros(()) if self.training else None


def sparse_mlp(config: VMoeConfig) -> nn.Module:
    """One router and its experts."""
    return VMoeExpertChoiceMlp(config) if config.routing == EXPERT_CHOICE else VMoeSparseMlp(config)


class VMoeEnsembleMlp(nn.Module):
    """A sparse MLP for each member of an ensemble."""

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__()
        self.members = nn.ModuleList(sparse_mlp(config) for _ in range(config.ensemble_size))

    def forward(self, hidden_BPH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each member's images to itself, (B, P, H); in training the mean of their auxiliary losses."""
        parts = hidden_BPH.reshape(len(self.members), -1, *hidden_BPH.shape[1:]).unbind(0)
        mixed, losses = zip(*(member(part) for member, part in zip(self.members, parts, strict=True)), strict=True)
        return torch.cat(mixed), torch.stack(losses).mean() if self.training else None


class VMoeLayer(nn.Module):
    """A pre-LayerNorm transformer block with a dense or a sparse MLP."""

    def __init__(self, config: VMoeConfig, block: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VMoeSelfAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        experts = sparse_mlp if config.ensemble_size == 1 else VMoeEnsembleMlp
        self.mlp = experts(config) if config.has_experts(block) else VMoeMlp(config)

    def forward(self, hidden_BPH: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, P, H) to (B, P, H), and the auxiliary loss of a sparse MLP in training."""
        hidden_BPH = hidden_BPH + self.attention(self.layernorm_before(hidden_BPH))
        mixed_BPH, aux_loss = self.mlp(self.layernorm_after(hidden_BPH))
        return hidden_BPH + mixed_BPH, aux_loss


class VMoeForImageClassification(PreTrainedModel):  # type: ignore[no-untyped-call] # as VMoeConfig
    """Stem, encoder blocks, LayerNorm, mean over the tokens, linear classifier; an ensemble's mean probabilities."""

    config_class = VMoeConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules = ["VMoeLayer"]  # noqa: RUF012 - transformers reads it, and nobody writes

    def __init__(self, config: VMoeConfig) -> None:
        super().__init__(config)
        self.stem = VMoeStem(config)
        self.layers = nn.ModuleList(VMoeLayer(config, block) for block in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pre_logits = nn.Linear(config.hidden_size, config.hidden_size) if config.pre_logits else None
        assert config.num_labels is not None  # PreTrainedConfig counts id2label
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> VMoeImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, S, S) float.
            labels: (B,) int64 classes; asks for the loss.

        Returns:
            logits (B, num_labels); with ``labels`` the loss: cross-entropy, and in training mode the auxiliary loss of
            the routers times ``router_aux_loss_coef``. An ensemble's logits are the logarithm of its members' mean
            probability; in training its cross-entropy is the mean of its members', as in google-research/vmoe.
        """
        of_members, total = self._of_members(pixel_values)
        logits_BC = mean_prediction(of_members, self.config.ensemble_size)
        loss = None
        if labels is not None:
            judged = of_members if self.training else logits_BC
            loss = functional.cross_entropy(judged, labels.repeat(len(judged) // len(labels)))
            loss = loss if total is None else loss + self.config.router_aux_loss_coef * total
        return VMoeImageClassifierOutput(loss=loss, logits=logits_BC, aux_loss=total)

    def _of_members(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (M * B, C), one member's after those of another, and in training the routers' auxiliary losses."""
        hidden_BPH = self.stem(pixel_values)
        aux_losses = []
        for block, layer in enumerate(self.layers):
            if block == self.config.moe_every - 1 and self.config.ensemble_size > 1:
                hidden_BPH = hidden_BPH.repeat(self.config.ensemble_size, 1, 1)
            hidden_BPH, aux_loss = layer(hidden_BPH)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        total = torch.stack(aux_losses).sum() if aux_losses else None
        hidden_BPH = self.layernorm(hidden_BPH)
        pooled_BH = hidden_BPH[:, 0] if self.config.class_token else hidden_BPH.mean(dim=1)
        if self.pre_logits is not None:
            pooled_BH = self.pre_logits(pooled_BH).tanh()
        return self.classifier(pooled_BH), total

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier for dense layers and experts, Kaiming for the stem, small normal for routers and positions."""
        if isinstance(module, VMoeStem):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, VMoeRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, VMoeExperts):
            bound = (6 / sum(module.up_proj.shape[1:])) ** 0.5
            init.uniform_(module.up_proj, -bound, bound)
            init.uniform_(module.down_proj, -bound, bound)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            _zero_bias(module)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            _zero_bias(module)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


def mean_prediction(logits: Tensor, members: int) -> Tensor:
    """The logarithm of the mean probability, (B, C), of logits (M * B, C); those of a single member stay as they are.

    >>> mean_prediction(torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log(), members=2).exp()
    tensor([[0.6000, 0.4000]])
    """
    if members == 1:
        return logits
    logits_MBC = logits.log_softmax(dim=-1).reshape(members, -1, logits.shape[-1])
    return logits_MBC.logsumexp(dim=0) - math.log(members)


def _zero_bias(module: nn.Conv2d | nn.Linear) -> None:
    if module.bias is not None:
        init.zeros_(module.bias)
