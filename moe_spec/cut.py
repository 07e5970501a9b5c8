"""A model cut at its MoE layers, or whose routing is an input: `graph_passes.variants` writes it, `verify` runs it."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Layer:
    """One MoE layer.

    Attributes:
        name: of the layer.
        keep: for each expert its id in the source model.
        top_k: K of this graph.
    """

    name: str
    keep: tuple[int, ...]
    top_k: int


@dataclasses.dataclass(frozen=True)
class WatchedLayer(Layer):
    """One of a model that shows the values around it, all float32.

    Attributes:
        hidden: output (T, H): what the experts read.
        out: output (T, H): the weighted sum of what they give.
        gates: output (T, E): the weight of each expert, 0 where it is not selected.
        scores: output (T, E): what top-k ranks.
    """

    hidden: str
    out: str
    gates: str
    scores: str


@dataclasses.dataclass(frozen=True)
class CutLayer(WatchedLayer):
    """One that is also given these values: nothing behind a cut reads what was computed before it.

    Attributes:
        given_hidden: input (T, H) in the place of ``hidden`` for whatever reads it.
        given_out: input (T, H) in the place of ``out``.
        forced: the two inputs (T, K) that say which experts are run, and what multiplies their outputs, whatever the
            router chose; None where an op routes by itself.
    """

    given_hidden: str
    given_out: str
    forced: tuple[str, str] | None


@dataclasses.dataclass(frozen=True)
class WatchedModel:
    """An .onnx file with these layers, in graph order, and the outputs of the model that it was made from."""

    path: Path
    layers: tuple[WatchedLayer, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CutModel:
    """The same, cut."""

    path: Path
    layers: tuple[CutLayer, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ForcedLayer(Layer):
    """One whose routing is an input.

    Attributes:
        inputs: ids and weights (T, K), as ``CutLayer.forced``.
    """

    inputs: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class ForcedModel:
    """An .onnx file of which every router is idle."""

    path: Path
    layers: tuple[ForcedLayer, ...]
