"""Run models that are cut at their MoE layers (`moe_spec.cut`): every part on what the reference computed up to there.

T tokens, E experts, K of them selected, H hidden width.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_spec.cut import CutLayer, CutModel, WatchedLayer, WatchedModel
from moe_spec.runner import Arrays, Feeds
from runtime.backend import Session
from runtime.backends import open_session
from runtime.execution import BY_DEFAULT, Execution
from runtime.parity import Floats, slots_of
from runtime.verification.sides import run_cast


@dataclasses.dataclass(frozen=True)
class CutPair:
    """Two models, the first of them twice.

    Attributes:
        watched: the reference, which shows its values and is not cut.
        reference: the reference, cut.
        candidate: the candidate, cut; its layers are among those of the other two.
    """

    watched: WatchedModel
    reference: CutModel
    candidate: CutModel


class LayerPair(NamedTuple):
    """One layer in the three of a `CutPair`."""

    watched: WatchedLayer
    reference: CutLayer
    candidate: CutLayer

    @property
    def can_be_forced(self) -> bool:
        """Whether both can be told which experts to run."""
        return self.reference.forced is not None and self.candidate.forced is not None


@dataclasses.dataclass(frozen=True)
class CutRun:
    """A `CutPair` whose models are open."""

    pair: CutPair
    watched: Session
    reference: Session
    candidate: Session

    @classmethod
    @contextlib.contextmanager
    def open(cls, pair: CutPair, threads: int, execution: Execution = BY_DEFAULT) -> Iterator["CutRun"]:
        """Load all three; ``execution`` is how ONNX Runtime is to run the candidate.

        Raises:
            UserError: one of them cannot be run here.
        """
        with contextlib.ExitStack() as stack:
            models = ((pair.watched, BY_DEFAULT), (pair.reference, BY_DEFAULT), (pair.candidate, execution))
            yield cls(pair, *(stack.enter_context(open_session(model.path, threads, how)) for model, how in models))

    @property
    def layers(self) -> list[LayerPair]:
        """Those of the candidate, in graph order."""
        watched = {layer.name: layer for layer in self.pair.watched.layers}
        reference = {layer.name: layer for layer in self.pair.reference.layers}
        return [LayerPair(watched[layer.name], reference[layer.name], layer) for layer in self.pair.candidate.layers]

    def of_reference(self, feeds: Feeds) -> Arrays:
        """What the reference computes, uncut."""
        return run_cast(self.watched, feeds)

    def of_candidate(self, feeds: Feeds, values: Arrays) -> Arrays:
        """What each part of the candidate computes of ``values``, the reference's."""
        return run_cast(self.candidate, {**feeds, **self._given(self.pair.candidate, values)})

    def alone(
        self, layer: LayerPair, feeds: Feeds, values: Arrays, chosen_T: npt.NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """What reference and candidate give, (T, H) each, with every token sent to one expert only, with weight 1."""
        sides = (
            (self.reference, self.pair.reference, layer.reference),
            (self.candidate, self.pair.candidate, layer.candidate),
        )
        mine, theirs = (
            run_cast(session, {**feeds, **self._given(model, values), **_sent_to(own, chosen_T)}, [own.out])[own.out]
            for session, model, own in sides
        )
        return mine.astype(np.float64), theirs.astype(np.float64)

    def _given(self, model: CutModel, values: Arrays) -> Arrays:
        """The inputs of a cut model: hidden states, sums, and the choice of experts."""
        watched = {layer.name: layer for layer in self.pair.watched.layers}
        given: Arrays = {}
        for layer in model.layers:
            source = watched[layer.name]
            given |= {layer.given_hidden: values[source.hidden], layer.given_out: values[source.out]}
            if layer.forced is not None:
                given |= _chosen_by(source, values[source.gates], layer)
        return given


def _chosen_by(source: WatchedLayer, gates_TE: npt.NDArray[np.float32], layer: CutLayer) -> Arrays:
    """The ids and weights for ``layer`` that say what the router of ``source`` chose."""
    place_of = {expert: place for place, expert in enumerate(source.keep)}
    return _routing(layer, *slots_of(gates_TE[:, [place_of[expert] for expert in layer.keep]], layer.top_k))


def _sent_to(layer: CutLayer, chosen_T: npt.NDArray[np.int64]) -> Arrays:
    """Each token to one expert, by its id in the source model; other slots get other experts, with weight 0."""
    place_of = {expert: place for place, expert in enumerate(layer.keep)}
    first_T = np.asarray([place_of[expert] for expert in chosen_T.tolist()])
    ids_TK = (first_T[:, None] + np.arange(layer.top_k)) % len(layer.keep)
    return _routing(layer, ids_TK, np.broadcast_to(np.arange(layer.top_k) == 0, ids_TK.shape).astype(np.float32))


def _routing(layer: CutLayer, ids_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float32]) -> Arrays:
    assert layer.forced is not None
    return dict(zip(layer.forced, (ids_TK, weights_TK), strict=True))
