"""A dense BERT becomes a classifier with experts, each a copy of the layer it stands for: arXiv 2212.05055."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BertModel

from models.moe_bert.configuration import MoeBertConfig
from models.moe_bert.modeling import MoeBertForSequenceClassification
from moe_spec.errors import UserError


def upcycle(dense: BertModel, classes: Sequence[str], **changes: Any) -> MoeBertForSequenceClassification:
    """A classifier whose hidden states are those of ``dense``, https://arxiv.org/abs/2212.05055; in eval mode.

    Routers and classifier are drawn from torch's global generator.

    Args:
        dense: as many of its layers are taken as the configuration asks for, from below.
        classes: their names; a text's label is an index into them.
        changes: fields of ``MoeBertConfig`` that are other than in the configuration of ``dense``.

    Raises:
        UserError: more layers are asked for than ``dense`` has.
    """
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: label for label, name in enumerate(classes)}}
    own = labels | {"model_type": MoeBertConfig.model_type}
    config = MoeBertConfig.from_dict(dense.config.to_dict() | own | changes)
    there = dense.config.num_hidden_layers
    if config.num_hidden_layers > there:
        raise UserError(
            f"{config.num_hidden_layers} layers are asked for, and the dense BERT has {there}",
            hint=f"num_hidden_layers of at most {there}",
        )
    model = MoeBertForSequenceClassification(config)
    weights = dense.state_dict()
    filled = {name: weights.get(name, tensor) for name, tensor in model.bert.state_dict().items()}
    for index in config.moe_layers:
        layer = f"encoder.layer.{index}"
        for name, source in (("up_proj", f"{layer}.intermediate.dense"), ("down_proj", f"{layer}.output.dense")):
            for expert_name, dense_name in ((name, "weight"), (f"{name}_bias", "bias")):
                tensor = weights[f"{source}.{dense_name}"]
                copies = tensor.expand(config.num_experts, *tensor.shape)
                filled[f"{layer}.intermediate.experts.{expert_name}"] = copies
    model.bert.load_state_dict(filled)
    torch.nn.Module.eval(model)
    return model
