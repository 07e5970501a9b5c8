"""Form ``grouped``: op for op what transformers' own ONNX exporter writes."""

from benchmarks.masked.block import FUSED_SWIGLU, Block
from benchmarks.masked.constants import EXPERTS, HIDDEN, TOP_K


def grouped(_: Block) -> str:
    """As transformers' exporter writes it: sorted slots, a histogram, Range and Gather for each expert."""
    up, down = _unrolled("projected", "sorted_tokens", "gate_up_in_out"), _unrolled("y", "middle", "down_stack")
    experts = _ranges() + up + FUSED_SWIGLU + down
    return f"""
    slots = Reshape(ids, ints_m1)
    slot_count = Shape(slots)
    last_dim = Gather<axis = 0>(slot_count, int_0)
    sort_k = Reshape(last_dim, ints_1)
    ascending, order = TopK<axis = -1, largest = 0>(slots, sort_k)
    negative = Less(order, int_0)
    remainder = Mod<fmod = 0>(order, int_{TOP_K})
    uneven = Cast<to = 9>(remainder)
    rounded = And(negative, uneven)
    correction = Cast<to = 7>(rounded)
    quotient = Div(order, int_{TOP_K})
    token = Sub(quotient, correction)
    token_rows = Unsqueeze(token, ints_m1)
    sorted_tokens = GatherND(hidden, token_rows)
    slot_gates = Reshape(gates, ints_m1)
    order_rows = Unsqueeze(order, ints_m1)
    sorted_gates = GatherND(slot_gates, order_rows)
    ascending_float = Cast<to = 1>(ascending)
    bins_float = Div(ascending_float, one)
    bins = Cast<to = 7>(bins_float)
    clipped = Clip(bins, int_0, int_{EXPERTS - 1})
    ones_shape = Shape(clipped)
    ones = Expand(one, ones_shape)
    histogram = ScatterElements<reduction = "add", axis = 0>(zeros, clipped, ones)
    histogram_int32 = Cast<to = 6>(histogram)
    offsets_int32 = CumSum(histogram_int32, int_0)
    offsets = Cast<to = 7>(offsets_int32){experts}
    gates_column = Unsqueeze(sorted_gates, ints_m1)
    gated = Mul(y, gates_column)
    order_shape = Shape(order)
    empty = Expand(int_0, order_shape)
    positions = Range(int_0, last_dim, int_1)
    inverse = ScatterND(empty, order_rows, positions)
    inverse_rows = Unsqueeze(inverse, ints_m1)
    unsorted = GatherND(gated, inverse_rows)
    by_token = Reshape(unsorted, ints_m1_{TOP_K}_{HIDDEN})
    out = ReduceSum<keepdims = 0>(by_token, ints_1)"""


def _ranges() -> str:
    """``range_{expert}``: the rows of the sorted tokens that each expert takes."""
    bounds = ", ".join(f"bound_{expert}" for expert in range(EXPERTS))
    lines, start = f"\n    {bounds} = Split<axis = 0, num_outputs = {EXPERTS}>(offsets)", "int_0"
    for expert in range(EXPERTS):
        lines += f"""
    end_{expert} = Squeeze(bound_{expert}, ints_0)
    range_{expert} = Range({start}, end_{expert}, int_1)"""
        start = f"end_{expert}"
    return lines


def _unrolled(result: str, x: str, stack: str) -> str:
    """``result``: the rows of ``x``, each times the matrix of its expert."""
    matrices, products = (", ".join(f"{result}_{what}_{e}" for e in range(EXPERTS)) for what in ("matrix", "product"))
    each = "".join(
        f"""
    {result}_rows_{expert} = Gather<axis = 0>({x}, range_{expert})
    {result}_weight_{expert} = Squeeze({result}_matrix_{expert}, ints_0)
    {result}_product_{expert} = MatMul({result}_rows_{expert}, {result}_weight_{expert})"""
        for expert in range(EXPERTS)
    )
    return f"""
    {matrices} = Split<axis = 0, num_outputs = {EXPERTS}>({stack}){each}
    {result} = Concat<axis = 0>({products})"""
