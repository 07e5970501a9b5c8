"""Forms that compute every expert on every token: from ``hidden`` (T, H), ``ids`` and ``gates`` (T, K) to ``out``."""

from benchmarks.masked.block import Block
from benchmarks.masked.constants import DROPPED, EXPERTS, HIDDEN, WIDTH
from benchmarks.masked.routers import CONSTANT_IF, ZERO_BRANCH


def stacked(block: Block) -> str:
    """Every expert on every token, as batched MatMuls over (E, T, H)."""
    return f"""
    hidden_1TH = Unsqueeze(hidden, ints_0){block.middle("hidden_1TH", "stack")}
    y_ETH = MatMul(middle, down_stack){block.spread_gates()}
    gates_ET = Transpose<perm = [1, 0]>(gates_TE)
    gates_ET1 = Unsqueeze(gates_ET, ints_2)
    gated = Mul(y_ETH, gates_ET1)
    out = ReduceSum<keepdims = 0>(gated, ints_0)"""


def dense(block: Block) -> str:
    """Every expert on every token, side by side in 2-D GEMMs, the gate before the down projection."""
    width = WIDTH[block.ffn]
    return f"""{block.middle("hidden", "wide")}
    middle_TEF = Reshape(middle, ints_m1_{EXPERTS}_{width}){block.spread_gates()}
    gates_TE1 = Unsqueeze(gates_TE, ints_2)
    gated = Mul(middle_TEF, gates_TE1)
    gated_flat = Reshape(gated, ints_m1_{EXPERTS * width})
    out = MatMul(gated_flat, down_wide)"""


def masked_loop(block: Block) -> str:
    """A branch an expert: its FFN on every token, times its column of the gates."""

    def branch(expert: int) -> str:
        if block.mask == ZERO_BRANCH and expert in DROPPED:
            column, line = "zero", ""
        else:
            column, line = f"column_{expert}", _column(expert)
        return f"""{line}{block.expert(expert, "hidden")}
    gated_{expert} = Mul(y_of_{expert}, {column})"""

    return block.spread_gates() + "".join(map(branch, range(EXPERTS))) + _sum_of_branches()


def branches(block: Block) -> str:
    """A branch an expert, in an If that asks whether any token has selected it."""

    def branch(expert: int) -> str:
        condition, lines = f"used_{expert}", _used(expert)
        if block.mask == CONSTANT_IF and expert in DROPPED:
            condition, lines = "never", ""
        return f"""{lines}{_column(expert)}
    gated_{expert} = If({condition}) <
        then_branch = run_{expert} () => (float[tokens, {HIDDEN}] ran_{expert}) {{{block.expert(expert, "hidden")}
    ran_{expert} = Mul(y_of_{expert}, column_{expert})
        }},
        else_branch = skip_{expert} () => (float[tokens, {HIDDEN}] skipped_{expert}) {{
    skipped_{expert} = Expand(zero, hidden_shape)
        }}>"""

    shape = "\n    hidden_shape = Shape(hidden)"
    return block.spread_gates() + shape + "".join(map(branch, range(EXPERTS))) + _sum_of_branches()


def scan(block: Block) -> str:
    """A Scan over the experts' weights, every expert on every token."""
    width = WIDTH[block.ffn]
    shapes = {"gate": f"{HIDDEN}, {width}", "up": f"{HIDDEN}, {width}", "down": f"{width}, {HIDDEN}"}
    weights = "".join(f", float[{shapes[part]}] {part}_here" for part in block.parts)
    stacks = "".join(f", {part}_stack" for part in block.parts)
    return f"""{block.spread_gates()}
    gates_ET = Transpose<perm = [1, 0]>(gates_TE)
    gates_ET1 = Unsqueeze(gates_ET, ints_2)
    hidden_shape = Shape(hidden)
    nothing = Expand(zero, hidden_shape)
    out = Scan<num_scan_inputs = {1 + len(block.parts)},
        body = step (float[tokens, {HIDDEN}] sum, float[tokens, 1] column{weights})
            => (float[tokens, {HIDDEN}] next_sum) {{{block.middle("hidden", "here")}
    y = MatMul(middle, down_here)
    gated = Mul(y, column)
    next_sum = Add(sum, gated)
        }}>(nothing, gates_ET1{stacks})"""


def _column(expert: int) -> str:
    return f"\n    column_{expert} = Slice(gates_TE, ints_{expert}, ints_{expert + 1}, ints_1)"


def _used(expert: int) -> str:
    return f"""
    hit_{expert} = Equal(ids, int_{expert})
    hit_number_{expert} = Cast<to = 7>(hit_{expert})
    most_{expert} = ReduceMax<keepdims = 0>(hit_number_{expert})
    used_{expert} = Cast<to = 9>(most_{expert})"""


def _sum_of_branches() -> str:
    lines, total = "", "gated_0"
    for expert in range(1, EXPERTS):
        name = "out" if expert == EXPERTS - 1 else f"sum_{expert}"
        lines += f"\n    {name} = Add({total}, gated_{expert})"
        total = name
    return lines
