"""Criteria without data: what a checkpoint's weights say of its experts. No model is run, and none is in memory."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_spec.errors import UserError
from pruning.criteria.scores import Scores

if TYPE_CHECKING:
    from pruning.stored_weights import StoredWeights


def aimer(checkpoint: Path, *, trust_remote_code: bool = False) -> list[Scores]:
    """How unevenly large an expert's weights are: ``S_e = -mean|w| / rms(w)``, over all of its matrices.

    From -1, where all have the same size, to near 0, where few are not 0; it does not depend on their scale. An expert
    of zeros gets -1, for it gives nothing. AIMER, https://arxiv.org/abs/2603.18492, drops the highest ratio, hence the
    sign. Biases are left out: the paper's models have none.

    Args:
        checkpoint: a transformers directory of a known family.
        trust_remote_code: run the Python files that config.json names (`models.own_code`).

    Raises:
        UserError: it is none, its files are not complete, or weights are not finite.
    """
    from pruning.stored_weights import StoredWeights  # torch takes seconds to import, and most plans need none

    weights = StoredWeights(checkpoint, trust_remote_code=trust_remote_code)
    scores = []
    for layer in weights.layers:
        counts_E, sums_E, squares_E = np.zeros((3, layer.num_experts))
        for expert, piece in weights.experts(layer):
            counts_E[expert] += piece.size
            sums_E[expert] += np.abs(piece).sum()
            squares_E[expert] += np.square(piece).sum()  # `piece @ piece` would wake all of BLAS' threads for it
        mean_E, rms_E = sums_E / counts_E, np.sqrt(_finite(squares_E / counts_E, layer.name, checkpoint))
        scores.append(-np.divide(mean_E, rms_E, out=np.ones_like(rms_E), where=rms_E != 0))
    return scores


def router_norm(checkpoint: Path, pretrained: Path, *, trust_remote_code: bool = False) -> list[Scores]:
    """How much fine-tuning lengthened an expert's router row: ``S_e = ||w_e||_2 - ||w_e of before||_2``, signed.

    Neither the length of the difference nor the size of the change: a row that became shorter is the first to go.
    https://arxiv.org/abs/2405.16646, which ranks within a layer only, and whose router stays full (``--router full``).
    In an ensemble, its second model, a layer is what a member has of a block: members are ranked each by itself, and
    keep as many. That they have to is our reading; the authors' code has no ensembles. Where experts choose their
    tokens an expert's row goes with it, in the paper too, and the capacity of the others stays.

    Args:
        checkpoint: fine-tuned on the task.
        pretrained: what it was fine-tuned from, with the same experts in the same order.
        trust_remote_code: run the Python files that either's config.json names (`models.own_code`).

    Raises:
        UserError: one of them is no checkpoint, they have other routers, or no row of any changed its length.
    """
    from pruning.stored_weights import StoredWeights

    after, before = (StoredWeights(path, trust_remote_code=trust_remote_code) for path in (checkpoint, pretrained))
    _require_same_routers(after, before)
    changes = [new_E - old_E for new_E, old_E in zip(_router_lengths(after), _router_lengths(before), strict=True)]
    if not any(change_E.any() for change_E in changes):
        raise UserError(
            f"no router row of {checkpoint} is longer or shorter than in {pretrained}",
            hint="--pretrained takes the checkpoint before fine-tuning; where routers were frozen, rank by statistics",
        )
    return changes


def _require_same_routers(after: "StoredWeights", before: "StoredWeights") -> None:
    here, there = (
        {layer.name: f"{layer.num_experts} rows of {layer.hidden_size}" for layer in weights.layers}
        for weights in (after, before)
    )
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            raise UserError(
                f"the router of layer {name} has {there.get(name, 'no rows')} in {before.checkpoint}, "
                f"but {here.get(name, 'no rows')} in {after.checkpoint}",
                hint="--pretrained takes the checkpoint that this one was fine-tuned from",
            )


def _router_lengths(weights: "StoredWeights") -> list[Scores]:
    return [
        _finite(np.linalg.norm(weights.router(layer), axis=1), layer.name, weights.checkpoint)
        for layer in weights.layers
    ]


def _finite(values_E: Scores, layer: str, checkpoint: Path) -> Scores:
    if not np.isfinite(values_E).all():
        raise UserError(
            f"the weights of layer {layer} in {checkpoint} are not finite", hint="get the checkpoint again, complete"
        )
    return values_E
