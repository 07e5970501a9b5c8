"""A model cut at its MoE layers: what `graph_passes.cut` writes, and what a search for a fault runs."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class CutLayer:
    """One MoE layer of a model that shows, or is given, the values around it. All are float32 but for ``ids``.

    Attributes:
        name: of the layer.
        keep: for each expert its id in the source model.
        top_k: K of this graph.
        hidden: output (T, H): what the experts read.
        out: output (T, H): the weighted sum of what they give.
        gates: output (T, E): the weight of each expert, 0 where it is not selected.
        scores: output (T, E): what top-k ranks.
        given_hidden: input (T, H) in the place of ``hidden`` for whatever reads it; None where nothing is cut.
        given_out: input (T, H) in the place of ``out``.
        ids: input (T, K): the experts that are computed, whatever the router chose; None where they cannot be told.
        weights: input (T, K): what multiplies their outputs.
    """

    name: str
    keep: tuple[int, ...]
    top_k: int
    hidden: str
    out: str
    gates: str
    scores: str
    given_hidden: str | None = None
    given_out: str | None = None
    ids: str | None = None
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class CutModel:
    """An .onnx file with these layers, in graph order, and the outputs of the model that it was made from."""

    path: Path
    layers: tuple[CutLayer, ...]
    outputs: tuple[str, ...]
