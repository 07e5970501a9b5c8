"""The configuration of a BERT classifier with experts."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig


@strict
class MoeBertConfig(BertConfig):  # type: ignore[no-untyped-call] # its __init_subclass__ is not annotated
    """What BERT's own configuration says, and where its experts are.

    Attributes:
        num_experts: E, each as wide as the feed-forward layer it stands for: ``intermediate_size``.
        num_experts_per_tok: K.
        moe_layers: encoder layers (zero-based) that have experts.
        router_aux_loss_coef: weight in the training loss of each MoE layer's load-balancing loss.
    """

    model_type = "moe_bert"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layers: list[int] | tuple[int, ...] = (3, 5)
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        """JSON knows no tuples: the same list before saving and after loading."""
        self.moe_layers = list(self.moe_layers)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def validate_architecture(self) -> None:
        """Called by transformers on reading and saving.

        Raises:
            ValueError: a router that selects more experts than there are, or experts in a layer that is not there.
        """
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"the router selects {self.num_experts_per_tok} of {self.num_experts} experts")
        absent = sorted(set(self.moe_layers) - set(range(self.num_hidden_layers)))
        if absent:
            raise ValueError(f"experts are in layers {absent}, but there are {self.num_hidden_layers} layers")
