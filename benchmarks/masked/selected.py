"""Forms that compute what was selected: from ``hidden`` (T, H), ``ids`` and ``gates`` (T, K) to ``out`` (T, H)."""

from collections.abc import Callable

from benchmarks.masked.block import FUSED_SWIGLU, Block
from benchmarks.masked.constants import EXPERTS, HIDDEN, TOP_K


def nonzero(block: Block) -> str:
    """The eager loop of transformers: who chose an expert is gathered, its output is added back."""

    def branch(expert: int) -> str:
        before, after = f"sum_{expert}", "out" if expert == EXPERTS - 1 else f"sum_{expert + 1}"
        return f"""
    chosen_{expert} = Gather<axis = 0>(chosen_EKT, int_{expert})
    places_{expert} = NonZero(chosen_{expert})
    token_{expert} = Gather<axis = 0>(places_{expert}, int_1)
    x_{expert} = Gather<axis = 0>(hidden, token_{expert}){block.expert(expert, f"x_{expert}")}
    slot_token_{expert} = Transpose<perm = [1, 0]>(places_{expert})
    gates_{expert} = GatherND(gates_KT, slot_token_{expert})
    column_{expert} = Unsqueeze(gates_{expert}, ints_1)
    gated_{expert} = Mul(y_of_{expert}, column_{expert})
    rows_{expert} = Unsqueeze(token_{expert}, ints_1)
    {after} = ScatterND<reduction = "add">({before}, rows_{expert}, gated_{expert})"""

    return f"""
    chosen_TKE = OneHot<axis = -1>(ids, int_{EXPERTS}, ints_0_1)
    chosen_EKT = Transpose<perm = [2, 1, 0]>(chosen_TKE)
    gates_KT = Transpose<perm = [1, 0]>(gates)
    hidden_shape = Shape(hidden)
    sum_0 = Expand(zero, hidden_shape)""" + "".join(map(branch, range(EXPERTS)))


def gather(block: Block) -> str:
    """Weights gathered for each token."""
    picked = "".join(f"\n    {part}_picked = Gather<axis = 0>({part}_stack, ids)" for part in block.parts)
    return f"""{picked}
    hidden_T11H = Unsqueeze(hidden, ints_1_2){block.middle("hidden_T11H", "picked")}
    y_TK1H = MatMul(middle, down_picked)
    gates_TK11 = Unsqueeze(gates, ints_2_3)
    gated = Mul(y_TK1H, gates_TK11)
    out = ReduceSum<keepdims = 0>(gated, ints_1_2)"""


def batched_mm(_: Block) -> str:
    """As torch.onnx exports transformers' batched_mm: GatherND of weights for each slot, gate and up in one."""
    return f"""
    hidden_T1H = Unsqueeze(hidden, ints_1)
    repeated = Expand(hidden_T1H, ints_1_{TOP_K}_1)
    token_of_slot = Reshape(repeated, ints_m1_{HIDDEN})
    slots = Reshape(ids, ints_m1)
    rows = Unsqueeze(slots, ints_m1)
    up_picked = GatherND(gate_up_out_in, rows)
    x_column = Unsqueeze(token_of_slot, ints_m1)
    projected_column = MatMul(up_picked, x_column)
    projected = Squeeze(projected_column, ints_m1){FUSED_SWIGLU}
    down_picked = GatherND(down_out_in, rows)
    middle_column = Unsqueeze(middle, ints_m1)
    y_column = MatMul(down_picked, middle_column)
    y = Squeeze(y_column, ints_m1)
    slot_gates = Reshape(gates, ints_m1)
    gates_column = Unsqueeze(slot_gates, ints_m1)
    gated = Mul(y, gates_column)
    by_token = Reshape(gated, ints_m1_{TOP_K}_{HIDDEN})
    out = ReduceSum<keepdims = 0>(by_token, ints_1)"""


def sorted_runs(block: Block) -> str:
    """Slots sorted by expert; each FFN takes its run of them from a Split whose sizes are counts."""
    runs = ", ".join(f"run_{expert}" for expert in range(EXPERTS))
    return _sorted(block, f"\n    {runs} = Split<axis = 0>(sorted_tokens, counts)", lambda _: "")


def sorted_slices(block: Block) -> str:
    """Slots sorted by expert; each FFN takes its run of them by a Slice."""
    bounds = """
    ends = CumSum(counts, int_0)
    starts = Sub(ends, counts)"""

    def run(expert: int) -> str:
        return f"""
    start_{expert} = Slice(starts, ints_{expert}, ints_{expert + 1})
    end_{expert} = Slice(ends, ints_{expert}, ints_{expert + 1})
    run_{expert} = Slice(sorted_tokens, start_{expert}, end_{expert}, ints_0)"""

    return _sorted(block, bounds, run)


def _sorted(block: Block, bounds: str, run: Callable[[int], str]) -> str:
    """``bounds``, then for each expert ``run``, give ``run_{expert}``: its rows of ``sorted_tokens``."""
    ffns = "".join(run(expert) + block.expert(expert, f"run_{expert}") for expert in range(EXPERTS))
    results = ", ".join(f"y_of_{expert}" for expert in range(EXPERTS))
    return f"""
    slots = Reshape(ids, ints_m1)
    slot_count = Shape(slots)
    ascending, order = TopK<axis = 0, largest = 0>(slots, slot_count)
    token = Div(order, int_{TOP_K})
    sorted_tokens = Gather<axis = 0>(hidden, token)
    slots_column = Unsqueeze(slots, ints_1)
    hit = Equal(slots_column, ints_0_1_2_3_4_5_6_7)
    hit_number = Cast<to = 7>(hit)
    counts = ReduceSum<keepdims = 0>(hit_number, ints_0){bounds}{ffns}
    outputs = Concat<axis = 0>({results})
    slot_gates = Reshape(gates, ints_m1_1)
    sorted_gates = Gather<axis = 0>(slot_gates, order)
    gated = Mul(outputs, sorted_gates)
    rising, inverse = TopK<axis = 0, largest = 0>(order, slot_count)
    unsorted = Gather<axis = 0>(gated, inverse)
    by_token = Reshape(unsorted, ints_m1_{TOP_K}_{HIDDEN})
    out = ReduceSum<keepdims = 0>(by_token, ints_1)"""
