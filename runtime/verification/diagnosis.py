"""What a part that went wrong does instead, in words: the mistakes that pruning and exporting models really make.

T tokens, E experts of the source model, H hidden width. Everything here compares the reference with the candidate after
both were given the same hidden states.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_spec.runner import error_between
from runtime.parity import Floats, Routing, moved_experts, say_moved

Table = tuple[Floats, Floats]
"""What an expert of the reference and the same one of the candidate give, (T, H) each."""

_TINY = 1e-30


def what_router_does(mine: Routing, theirs: Routing, tolerance: float) -> str:
    """Whose score an expert has, or how its gate differs where the same experts are selected."""
    moved = (
        moved_experts(mine, theirs)
        or _moved(mine.scores, theirs.scores, tolerance)
        or _moved(*_without_shift(mine.scores, theirs.scores), tolerance)
    )
    if moved:
        return f"it {say_moved(moved)}"
    same_T = ((mine.gates != 0) == (theirs.gates != 0)).all(axis=1)
    if not same_T.all():
        return f"it selects other experts for {int((~same_T).sum())} of {len(same_T)} tokens"
    sums_T, other_sums_T = mine.gates.sum(axis=1), theirs.gates.sum(axis=1)
    ratios_T = other_sums_T / np.where(np.abs(sums_T) < _TINY, _TINY, sums_T)
    if not _close(theirs.gates, mine.gates * ratios_T[:, None], tolerance):
        return "it selects the same experts, with other gates"
    if _close(ratios_T, np.full_like(ratios_T, np.median(ratios_T)), tolerance):
        return f"it selects the same experts, with gates {np.median(ratios_T):.3g} times as large"
    return (
        f"it selects the same experts, with gates that add up to {_range(other_sums_T)} "
        f"for a token instead of {_range(sums_T)}: only one of the two renormalises them"
    )


def what_experts_do(tables: Mapping[int, Table], wrong: Sequence[int], experts: int, tolerance: float) -> str:
    """What each of ``tables`` gives instead; ``wrong`` are all that differ, of the layer's ``experts``."""
    if not wrong:
        return "each gives what it should by itself, but not their sum"
    words = {expert: _what_expert_does(expert, tables, tolerance) for expert in tables}
    if len(words) > 1 and not any(words.values()):
        errors = np.array([_error(*table) for table in tables.values()])
        return f"they differ by {_range(errors)} of their largest magnitude"
    words = {
        expert: does or f"differs by {_error(*tables[expert]):.3g} of its largest magnitude"
        for expert, does in words.items()
    }
    if len(set(words.values())) > 1:
        return "; ".join(f"expert {expert} {does}" for expert, does in words.items())
    everybody = "every expert of the layer" if len(wrong) == experts else "it" if len(wrong) == 1 else "each"
    return f"{everybody} {next(iter(words.values()))}"


def _what_expert_does(expert: int, tables: Mapping[int, Table], tolerance: float) -> str:
    """In words; empty for a difference that is none of the mistakes known here."""
    wanted, found = tables[expert]
    if not found.any():
        return "gives nothing"
    other = next((one for one, (its, _) in tables.items() if one != expert and _close(found, its, tolerance)), None)
    if other is not None:
        return f"gives what expert {other} should"
    factor = float((wanted * found).sum() / max(float((wanted * wanted).sum()), _TINY))
    if _close(found, wanted * factor, tolerance):
        return f"gives {factor:.3g} times what it should"
    return ""


def _error(wanted: Floats, found: Floats) -> float:
    return error_between(wanted, found)[1]


def _moved(scores_TE: Floats, others_TE: Floats, tolerance: float) -> dict[int, int]:
    """The experts whose scores are those that another one should have, and which."""
    moved = {}
    for expert in range(min(scores_TE.shape[1], others_TE.shape[1])):
        column = others_TE[:, expert]
        if not np.isfinite(column).all() or _close(column, scores_TE[:, expert], tolerance):
            continue
        others = (other for other in range(scores_TE.shape[1]) if _close(column, scores_TE[:, other], tolerance))
        other = next(others, None)
        if other is not None:
            moved[expert] = other
    return moved


def _without_shift(scores_TE: Floats, others_TE: Floats) -> tuple[Floats, Floats]:
    """Logarithms of probabilities, shifted: another logit of one expert changes the probabilities of all."""
    if min(scores_TE.min(), others_TE.min()) <= 0 or scores_TE.shape != others_TE.shape:
        return scores_TE, others_TE
    logs_TE, other_logs_TE = np.log(scores_TE), np.log(others_TE)
    return logs_TE, other_logs_TE - np.median(other_logs_TE - logs_TE, axis=1, keepdims=True)


def _close(found: Floats, wanted: Floats, tolerance: float) -> bool:
    """Within ``tolerance`` of the largest magnitude."""
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return False
    return bool(
        np.abs(found - wanted).max(initial=0.0) <= tolerance * max(float(np.abs(wanted).max(initial=0.0)), _TINY)
    )


def _range(values_T: Floats) -> str:
    low, high = f"{values_T.min():.3g}", f"{values_T.max():.3g}"
    return low if low == high else f"{low} to {high}"
