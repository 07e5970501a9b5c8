"""The configuration of a V-MoE image classifier."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

TOKEN_CHOICE, EXPERT_CHOICE = "token_choice", "expert_choice"
"""Who chooses: each token its K experts, or each expert its C tokens (https://arxiv.org/abs/2202.09368)."""

_COUNTS = (
    "image_size",
    "num_channels",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "moe_every",
    "patch_size",
)
"""Fields that count something that a model cannot be without; a patch size may be None."""


@strict
class VMoeConfig(PreTrainedConfig):  # type: ignore[no-untyped-call] # its __init_subclass__ is not annotated
    """Sizes of a V-MoE. The defaults are those of the embedded Fashion-MNIST model.

    Attributes:
        image_size: height and width of the input in pixels.
        num_channels: colour channels of the input.
        stem_channels: output channels of the stem's convolutions before the last one, which gives ``hidden_size``.
            Each halves height and width, rounding up.
        hidden_size: H.
        intermediate_size: F, of the dense MLPs and of each expert.
        num_hidden_layers: encoder blocks.
        num_attention_heads: heads, which share H evenly.
        num_experts: E, among which a token can choose. In an ensemble every member has as many of its own.
        num_experts_per_tok: K; 1 where experts choose, for a token then selects nothing.
        moe_every: every ``moe_every``-th block has experts; 2 means blocks 1, 3, 5, ... (zero-based).
        moe_layers: the blocks with experts, where they are others.
        patch_size: height and width of the patches of a stem of one convolution, as google-research/vmoe has it; None
            is the stem of ``stem_channels``.
        class_token: whether a token of its own is classified, instead of the mean.
        pre_logits: whether a dense layer and a tanh stand before the classifier.
        ensemble_size: M, members of an ensemble E3 (https://arxiv.org/abs/2110.03360); 1 is no ensemble. The paper's E
            counts the experts of all members, which share them evenly: ``M * num_experts`` here.
        routing: `TOKEN_CHOICE` or `EXPERT_CHOICE`.
        capacity_factor: of expert choice; 1 lets an image's tokens be taken once each, on average.
        expert_capacity: C of expert choice, the tokens of an image that an expert takes. Not given it is
            ``ceil(P * capacity_factor / num_experts)``, and stays that when experts are pruned (arXiv 2405.16646).
        hidden_act: activation of MLPs and experts, by its transformers name.
        router_aux_loss_coef: weight of the auxiliary loss in the training loss (lambda of the paper).
        initializer_range: standard deviation of the initial router weights and position embeddings.
        layer_norm_eps: epsilon of every LayerNorm.
    """

    model_type = "vmoe"

    image_size: int = 28
    num_channels: int = 1
    stem_channels: list[int] | tuple[int, ...] = (32, 64)
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_every: int = 2
    moe_layers: list[int] | None = None
    patch_size: int | None = None
    class_token: bool = False
    pre_logits: bool = False
    ensemble_size: int = 1
    routing: str = TOKEN_CHOICE
    capacity_factor: float = 1.5
    expert_capacity: int | None = None
    hidden_act: str = "gelu"
    router_aux_loss_coef: float = 0.01
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        """JSON knows no tuples: the same list before saving and after loading. A capacity is settled once."""
        self.stem_channels = list(self.stem_channels)
        if self.routing == EXPERT_CHOICE:
            self.num_experts_per_tok = 1
            if self.expert_capacity is None:
                self.expert_capacity = math.ceil(self.num_patches * self.capacity_factor / self.num_experts)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def validate_architecture(self) -> None:
        """Called by transformers on reading and saving.

        Raises:
            ValueError: a size below 1, a router that selects more experts than there are, heads that do not share H
                evenly, experts in a block that is not there, an ensemble without members or experts, or experts that
                cannot choose.
        """
        self._validate_counts()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"the router selects {self.num_experts_per_tok} of {self.num_experts} experts")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not share {self.hidden_size} channels evenly")

        if self.ensemble_size < 1:
            raise ValueError(f"an ensemble has at least one member, not {self.ensemble_size}")
        if self.ensemble_size > 1 and self.moe_layers is not None:
            raise ValueError("an ensemble has experts in every moe_every-th block")
        if self.ensemble_size > 1 and self.moe_every > self.num_hidden_layers:
            raise ValueError(f"none of {self.num_hidden_layers} blocks has experts for {self.ensemble_size} members")

        if self.routing not in (TOKEN_CHOICE, EXPERT_CHOICE):
            raise ValueError(f"routing is {TOKEN_CHOICE!r} or {EXPERT_CHOICE!r}, not {self.routing!r}")
        if self.routing == EXPERT_CHOICE:
            self._validate_expert_choice()

    def _validate_counts(self) -> None:
        for name in _COUNTS:
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} is {count}, expected at least 1")
        absent = sorted(set(self.moe_layers or ()) - set(range(self.num_hidden_layers)))
        if absent:
            raise ValueError(f"experts are in blocks {absent}, but there are {self.num_hidden_layers} blocks")

    def _validate_expert_choice(self) -> None:
        if self.num_experts < 2:
            raise ValueError("one expert has no choice: its softmax is 1 for every token")
        if self.expert_capacity is None or not 1 <= self.expert_capacity <= self.num_patches:
            raise ValueError(f"an expert takes {self.expert_capacity} of the {self.num_patches} tokens of an image")

    @property
    def num_patches(self) -> int:
        """Tokens of one image."""
        if self.patch_size is not None:
            return (self.image_size // self.patch_size) ** 2 + self.class_token
        side = self.image_size
        for _ in (*self.stem_channels, self.hidden_size):
            side = -(-side // 2)
        return side**2 + self.class_token

    def has_experts(self, block: int) -> bool:
        """Whether encoder block ``block`` (zero-based) has experts instead of a dense MLP.

        >>> [VMoeConfig(moe_every=2).has_experts(block) for block in range(4)]
        [False, True, False, True]
        """
        if self.moe_layers is not None:
            return block in self.moe_layers
        return block % self.moe_every == self.moe_every - 1
