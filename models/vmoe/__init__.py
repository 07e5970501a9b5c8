"""V-MoE, the sparse vision transformer of https://arxiv.org/abs/2106.05974, as a transformers model.

Importing this package needs no torch, so that ``models.vmoe.assets`` works on a device; ``register`` does.
"""


def register() -> None:
    """Make transformers' auto classes know model_type ``vmoe``; a second call does nothing."""
    from transformers import AutoConfig, AutoModelForImageClassification

    from models.vmoe.configuration import VMoeConfig
    from models.vmoe.modeling import VMoeForImageClassification

    AutoConfig.register(VMoeConfig.model_type, VMoeConfig, exist_ok=True)
    AutoModelForImageClassification.register(VMoeConfig, VMoeForImageClassification, exist_ok=True)
