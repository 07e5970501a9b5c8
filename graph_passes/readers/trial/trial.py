"""A routing decision on which a reader tries a block: which token goes to which expert, and what comes back.

Every expert is chosen, none twice by one token, and every weight and every hidden value is another number, so that what
arrives somewhere tells where it came from.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.record.block import FormError
from graph_passes.weights.weight import Array

MOST_SLOTS = 1 << 22
"""T K of one decision."""


class Trial:
    """What a router of ``experts`` and ``top_k`` might decide about tokens of ``width`` channels.

    Attributes:
        ids_TK: expert ids; ``range(experts)`` for every token where ``in_order``.
        weights_TK: distinct whole numbers.
        hidden_TH: distinct whole numbers.
    """

    def __init__(
        self,
        experts: int,
        top_k: int,
        width: int,
        *,
        tokens: int | None = None,
        loads: Array | None = None,
        in_order: bool = False,
        leads_to: Sequence[int] | None = None,
        aliases: Sequence[tuple[int, int]] = (),
    ) -> None:
        """``tokens`` is T where a graph has a fixed one, ``loads`` (E,) says which expert gets more than another.

        Only the ids in ``leads_to``, where that is given, are those of experts; in ``aliases`` the first of two ids is
        that of the second's expert.

        Raises:
            FormError: no such decision reaches every expert.
        """
        if not 1 <= top_k <= experts:
            raise FormError(f"the router selects K={top_k} of {experts} experts", None)
        if loads is None or top_k == experts:
            twice = tokens is None or tokens * top_k >= 2 * experts
            loads = np.full(experts, 2 if twice else 1)
        tokens, counts = _counts(top_k, loads, tokens)
        rng = np.random.default_rng(0)
        by_slot = np.repeat(np.arange(experts), counts).reshape(top_k, tokens)  # none twice: no count is above T
        shuffled = rng.permuted(rng.permutation(by_slot.T), axis=1)
        self.ids_TK: Array = np.tile(np.arange(experts), (tokens, 1)) if in_order else shuffled
        self.weights_TK: Array = 1.0 + rng.permutation(tokens * top_k).reshape(tokens, top_k)
        self.hidden_TH = numbered(tokens, width)
        self._experts, self._top_k, self._rng = experts, top_k, rng
        self.ids_of_experts = list(range(experts) if leads_to is None else leads_to)
        self._expert_of_id: Array = np.arange(experts)
        for alias, other in aliases:
            self._expert_of_id[alias] = other
        self._slot_of: Array = np.argsort(self.weights_TK.reshape(-1))

    @property
    def gates_TE(self) -> Array:
        """The weights where an expert is chosen, 0 where not."""
        gates_TE = np.zeros((self.tokens, self._experts))
        np.put_along_axis(gates_TE, self.ids_TK, self.weights_TK, axis=1)
        return gates_TE

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids_TK)

    def slots(self, weights: Array, node: gs.Node | None) -> Array:
        """For each of ``weights`` (n,) which of the T K slots it belongs to.

        Raises:
            FormError: it is no weight of the router.
        """
        flat = weights.reshape(-1)
        known = (flat >= 1) & (flat <= self.weights_TK.size) & (flat == np.floor(flat))
        if not known.all():
            raise FormError("an expert's output is weighed with something else than the router's weights", node)
        return np.asarray(self._slot_of[flat.astype(np.int64) - 1])

    def weights_of(self, slots: Array) -> Array:
        """(n, 1) the weights of ``slots``."""
        return np.asarray(self.weights_TK.reshape(-1, 1)[slots])

    def expert_of(self, slots: Array, node: gs.Node | None) -> int:
        """The one expert that all of ``slots`` chose.

        Raises:
            FormError: they chose several, or there are none.
        """
        chosen = sorted(set(self._experts_of(slots).tolist()))
        if len(chosen) != 1:
            raise FormError(f"a branch takes the tokens of experts {chosen}, expected those of one expert", node)
        return int(chosen[0])

    def require_silent(self, slots: Array, node: gs.Node | None) -> None:
        """Refuse ``slots`` that are passed by, of which one chose an expert.

        Raises:
            FormError: one did.
        """
        if np.isin(self._experts_of(slots), self.ids_of_experts).any():
            raise FormError("tokens are passed by the expert that they are weighed for", node)

    def _experts_of(self, slots: Array) -> Array:
        return np.asarray(self._expert_of_id[self.ids_TK.reshape(-1)[slots]])

    def outputs(self, count: int, width: int) -> Array:
        """(count, width) what an expert might give."""
        return self._rng.integers(1, 100, (count, width)).astype(np.float64)

    def summed(self, slots: Array, rows: Array) -> Array:
        """(T, H) what ``rows`` (n, H) of ``slots`` (n,) give, added up by token."""
        out_TH = np.zeros((self.tokens, rows.shape[-1]))
        np.add.at(out_TH, slots // self._top_k, rows)
        return out_TH

    def require_tokens(self, rows: Array, slots: Array, node: gs.Node | None, *, weighed: bool = False) -> None:
        """Refuse ``rows`` (..., H) that are not the hidden states of the tokens of ``slots`` (times their weights).

        Raises:
            FormError: they are others.
        """
        wanted = self.hidden_TH[slots // self._top_k] * (self.weights_of(slots) if weighed else 1.0)
        if rows.size != wanted.size or not np.array_equal(rows.reshape(wanted.shape), wanted):
            raise FormError("an expert does not read the tokens that it is weighed for", node)

    def require_all(self, found: Sequence[int], node: gs.Node) -> None:
        """Refuse branches of which not exactly one belongs to each expert.

        Raises:
            FormError: with the experts that are missing.
        """
        lost = sorted(set(self.ids_of_experts) - set(found))
        if lost:
            raise FormError(
                f"the router chooses among {self._experts} experts, the graph computes experts "
                f"{sorted(set(found))} only: the exporter lost {_listed(lost)}",
                node,
            )
        if len(found) != len(self.ids_of_experts):
            raise FormError(f"{len(found)} branches compute {len(self.ids_of_experts)} experts", node)


def told_apart(experts: int, slots: int | None) -> list[Array]:
    """Loads (E,) for decisions of which at least one tells any two experts apart by the number of their tokens.

    Each load is a digit of the expert's id; the fewer ``slots`` (T K) a graph has, the smaller the base.

    Raises:
        FormError: they are too few in any base.
    """
    ids, digits = np.arange(experts), 2
    while True:
        base = next(base for base in range(1, experts + 2) if base**digits >= experts)
        loads = [ids // base**digit % base + 1 for digit in range(digits)]
        if slots is None or max(int(load.sum()) for load in loads) <= slots:
            return loads
        if base == 2:
            raise FormError(f"the graph has {slots} slots for tokens, too few to tell {experts} experts apart", None)
        digits += 1


def _counts(top_k: int, loads: Array, fixed: int | None) -> tuple[int, Array]:
    """T, and for each expert how many of T tokens choose it: one that has more load than another never has less."""
    experts, total = len(loads), int(loads.sum())
    tokens = max(2, -(-total // top_k)) if fixed is None else fixed
    while total <= tokens * top_k <= MOST_SLOTS:
        base, rest = divmod(tokens * top_k - total, experts)
        counts = loads + base
        counts[np.argsort(loads, kind="stable")[experts - rest :]] += 1
        if counts.max() <= tokens:
            return tokens, counts
        if fixed is not None:
            break
        tokens += 1
    raise FormError(f"K={top_k} of {experts} experts cannot be tried on {tokens} tokens", None)


def fitted(values_TK: Array, tensor: gs.Tensor) -> Array:
    """``values_TK`` with as many axes as ``tensor`` has, as far as the graph says."""
    rank = 2 if tensor.shape is None else len(tensor.shape)
    return values_TK.reshape((1,) * (rank - 2) + values_TK.shape) if rank >= 2 else values_TK.reshape(-1)


def numbered(rows: int, width: int) -> Array:
    """(rows, width) whole numbers from 1 on."""
    return np.arange(1.0, rows * width + 1).reshape(rows, width)


def rows_of(values: Array, table: Array, node: gs.Node | None) -> Array:
    """Which rows of ``table``, made by `numbered`, stand in ``values`` (..., width).

    Raises:
        FormError: something else stands there.
    """
    width = table.shape[1]
    flat = values.reshape(-1, width) if values.size % width == 0 else values.reshape(1, -1)
    flat = np.nan_to_num(flat)
    rows = ((flat[:, 0] - 1) // width).astype(np.int64)
    inside = flat.shape[1] == width and bool(((rows >= 0) & (rows < len(table))).all())
    if not inside or not np.array_equal(table[rows], flat):
        raise FormError("an expert does not read whole rows of what it is given", node)
    return np.asarray(rows)


def _listed(experts: Iterable[int]) -> str:
    numbers = [str(expert) for expert in experts]
    return f"expert{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
