"""A tiny checkpoint with code of its own: a Mixtral by another name, in files of its directory."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.models_table import TINY

CONFIGURATION = """
from transformers import MixtralConfig


class OwnConfig(MixtralConfig):
    model_type = "own_moe"
"""

MODELING = """
from transformers import MixtralForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, **others):
        output = super().forward(input_ids, attention_mask, **others)
        output.logits = output.logits * 2  # nothing of transformers' own computes this
        return output
"""

FILES = {"configuration_own.py": CONFIGURATION, "modeling_own.py": MODELING}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Change values of config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_own(checkpoint: Path) -> Path:
    """Write the checkpoint; its weights have the names that its own code gives them."""
    model = TINY["mixtral"]()
    checkpoint.mkdir()
    model.config.save_pretrained(checkpoint)
    edit_config(checkpoint, model_type="own_moe", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for name, text in FILES.items():
        (checkpoint / name).write_text(text)
    return checkpoint
