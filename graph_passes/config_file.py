"""config.json beside a result: that of the source, with the counts of experts that the result has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_spec.manifest import BlockEntry
from moe_spec.record import Json, parse_object

CONFIG = "config.json"
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
"""What config.json calls E and K, in the families that transformers knows."""

PARTS = ("text_config", "ffn_config", "thinker_config")
"""What of config.json may have them instead: the language model's part, and DBRX's experts."""


def read_config(directory: Path) -> Json | None:
    """What config.json in ``directory`` says; None where there is none.

    Raises:
        UserError: it is no JSON object.
    """
    path = directory / CONFIG
    return parse_object(path, path.read_bytes(), "mend it, or remove it") if path.is_file() else None


def write_config(source: Path, target: Path, blocks: Sequence[BlockEntry], *, are_all: bool = True) -> None:
    """Write config.json into directory ``target``, where directory ``source`` has one; ``blocks`` say what is left.

    What each layer has stands in it by the layer's name. transformers has one E and one K for all layers: they are new
    where all layers agree, and stay where they do not, or where ``blocks`` are not all of them.
    """
    config = read_config(source)
    if config is not None:
        per_layer = {block.name: {"experts": block.experts, "top_k": block.top_k} for block in blocks}
        counts = _counts(blocks) if are_all else {}
        text = json.dumps({**_with_counts(config, counts), "moe_edge": per_layer}, indent=2, sort_keys=True)
        (target / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _counts(blocks: Sequence[BlockEntry]) -> dict[str, int]:
    """E and K where all layers agree, by every name that they may have."""
    counts = {
        **{key: {block.experts for block in blocks} for key in EXPERT_COUNT_KEYS},
        **{key: {block.top_k for block in blocks} for key in TOP_K_KEYS},
    }
    return {key: values.pop() for key, values in counts.items() if len(values) == 1}


def _with_counts(config: Mapping[str, Any], counts: Mapping[str, int]) -> Json:
    """``config`` whose counts, where it or a part of it has such, are ``counts``."""
    own = {key: count for key, count in counts.items() if isinstance(config.get(key), int)}
    parts = {key: _with_counts(config[key], counts) for key in PARTS if isinstance(config.get(key), dict)}
    return {**config, **own, **parts}
