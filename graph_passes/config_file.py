"""config.json beside a result: that of the source, with the counts of experts that the result has."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_spec.manifest import BlockEntry
from moe_spec.record import Json, parse_object

CONFIG = "config.json"
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok",)
"""What config.json calls E and K, in the families that transformers knows."""


def read_config(directory: Path) -> Json | None:
    """What config.json in ``directory`` says; None where there is none.

    Raises:
        UserError: it is no JSON object.
    """
    path = directory / CONFIG
    return parse_object(path, path.read_bytes(), "mend it, or remove it") if path.is_file() else None


def write_config(source: Path, target: Path, blocks: Sequence[BlockEntry]) -> None:
    """Write config.json into directory ``target``, where directory ``source`` has one; ``blocks`` say what is left."""
    config = read_config(source)
    if config is not None:
        text = json.dumps(_with_counts(config, blocks), indent=2, sort_keys=True)
        (target / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _with_counts(config: dict[str, Any], blocks: Sequence[BlockEntry]) -> dict[str, Any]:
    """``config`` with the new E and K where all layers agree, and both per layer in any case."""
    counts = {
        **{key: {block.experts for block in blocks} for key in EXPERT_COUNT_KEYS},
        **{key: {block.top_k for block in blocks} for key in TOP_K_KEYS},
    }
    agreed = {key: next(iter(values)) for key, values in counts.items() if key in config and len(values) == 1}
    per_layer = {block.name: {"experts": block.experts, "top_k": block.top_k} for block in blocks}
    return {**config, **agreed, "moe_edge": per_layer}
