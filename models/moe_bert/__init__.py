"""BERT with experts in place of some feed-forward layers, as a transformers model.

``upcycle`` makes one of a dense BERT, after https://arxiv.org/abs/2212.05055.
"""


def register() -> None:
    """Make transformers' auto classes know model_type ``moe_bert``; a second call does nothing."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from models.moe_bert.configuration import MoeBertConfig
    from models.moe_bert.modeling import MoeBertForSequenceClassification

    AutoConfig.register(MoeBertConfig.model_type, MoeBertConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(MoeBertConfig, MoeBertForSequenceClassification, exist_ok=True)
