"""Routers that leave only some experts within reach: from ``hidden`` (T, H) to ``ids`` and ``gates`` (T, K).

Each text is one way that exporters, or people who prune by hand, have of masking experts. Softmax, top-k, renormalised.
"""

from collections.abc import Mapping

from benchmarks.masked.constants import EXPERTS, KEPT

_PROJECT = "logits = Gemm<transB = 1>(hidden, {router})"
_RANK = """
    scores = Softmax<axis = -1>({ranked})
    best, {ids} = TopK<axis = -1>(scores, ints_2)
    total = ReduceSum<keepdims = 1>(best, ints_m1)
    gates = Div(best, total)"""


def _router(*lines: str, router: str = "router", ranked: str = "masked", ids: str = "ids") -> str:
    """``lines`` between the logits and what is ranked."""
    return "\n    ".join((_PROJECT.format(router=router), *lines)) + _RANK.format(ranked=ranked, ids=ids)


_PLAIN = _router(ranked="logits")

UNMASKED, WEAK, ADD, WHERE, BIAS, FINITE = "unmasked", "weak", "add", "where", "bias", "finite"
ZERO_GATES, ZERO_BRANCH, CONSTANT_IF = "zero_gates", "zero_branch", "constant_if"
FEWER_IDS, ID_TABLE = "fewer_ids", "id_table"

BEHIND = (ZERO_GATES, ZERO_BRANCH, CONSTANT_IF)
"""Masks behind the router (``every_token.py``): every expert competes for a gate, and some gates come to nothing."""

ROUTERS: Mapping[str, str] = {
    UNMASKED: _PLAIN,
    WEAK: _router("masked = Add(logits, minus_one_if_dropped)"),
    ADD: _router("masked = Add(logits, minus_inf_if_dropped)"),
    WHERE: _router("masked = Where(dropped, minus_inf, logits)"),
    BIAS: "logits = Gemm<transB = 1>(hidden, router, minus_inf_if_dropped)" + _RANK.format(ranked="logits", ids="ids"),
    FINITE: _router("masked = Add(logits, minus_billion_if_dropped)"),
    ZERO_GATES: _PLAIN,
    ZERO_BRANCH: _PLAIN,
    CONSTANT_IF: _PLAIN,
    FEWER_IDS: _router(router="router_first", ranked="logits"),
    ID_TABLE: _router(router="router_kept", ranked="logits", ids="columns")
    + "\n    ids = Gather<axis = 0>(ints_1_5, columns)",
}
"""By mask."""

WHY: Mapping[str, str] = {
    UNMASKED: "nothing is masked: a control, where nothing may go",
    WEAK: "-1 is added to the logits, which excludes nobody: the other control",
    ADD: "-inf is added to the logits",
    WHERE: "Where puts -inf for the logits",
    BIAS: "-inf in the bias of the router's Gemm",
    FINITE: "-1e9 is added to logits that a LayerNormalization bounds",
    ZERO_GATES: "the gates are multiplied by a constant 0",
    ZERO_BRANCH: "the branch's gate is a constant 0",
    CONSTANT_IF: "the branch's If has a constant condition",
    FEWER_IDS: "the router has fewer outputs than there are experts",
    ID_TABLE: "a table maps the TopK's indices to few ids",
}
"""The masks in words."""


def reachable(mask: str) -> tuple[int, ...]:
    """Ids of the experts that some input gives a gate other than 0, ascending."""
    everyone = tuple(range(EXPERTS))
    return {UNMASKED: everyone, WEAK: everyone, FEWER_IDS: everyone[: len(KEPT)]}.get(mask, KEPT)
