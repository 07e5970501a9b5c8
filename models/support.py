"""What is proven for which family: the table of ``moe-edge families``, made by ``python -m benchmarks.families``."""

import dataclasses
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from moe_spec.errors import require_known

TABLE = "support.json"

STAGES: Mapping[str, str] = {
    "read": "E and K of every MoE layer of a checkpoint are what its config says",
    "calibrated": "every token is counted for each expert that it selects",
    "pruned": "`prune` writes a checkpoint that computes what the original does with the dropped experts unselectable",
    "exported": "`export` gives a graph that computes what torch does, at three shapes that were not traced",
    "pruned in ONNX": "`optimize --plan` deletes experts of that graph, and it computes what the pruned model does",
    "KV cache": "a decoder's graph computes call after call what it computes at once, with all experts and with fewer",
    "TensorRT-RTX": "`optimize` and `build` give an engine",
}
"""What can be done with a family, and when it counts as proven."""


@dataclasses.dataclass(frozen=True)
class Support:
    """One family.

    Attributes:
        model_type: ``model_type`` in config.json.
        model: the class of the tiny random model that it was proven with; empty where none was made.
        why_not: what does not work, by stage, and the reason.
    """

    model_type: str
    model: str
    why_not: Mapping[str, str]

    def reason(self, stage: str) -> str | None:
        """Why one of `STAGES` is not proven; None: it is."""
        return self.why_not.get("read", self.why_not.get(stage))

    def to_json(self) -> dict[str, Any]:
        """As it stands in the table."""
        return {"model": self.model, "why_not": dict(self.why_not)}


def families(*model_types: str) -> tuple[Support, ...]:
    """The rows of these families, or all, by name; they say nothing of any model but the tiny ones.

    Raises:
        UserError: no row has one of these names.

    >>> families("mixtral")[0].reason("exported") is None
    True
    """
    rows = {name: Support(name, row["model"], row["why_not"]) for name, row in _table()["families"].items()}
    for model_type in model_types:
        require_known(model_type, "family that moe-edge has looked at", rows)
    return tuple(rows[name] for name in model_types or rows)


def tools() -> Mapping[str, str]:
    """The versions of what the table was made with."""
    versions: Mapping[str, str] = _table()["tools"]
    return versions


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(resources.files("models").joinpath(TABLE).read_text(encoding="utf-8"))
    return table
