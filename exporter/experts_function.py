"""The definition of ``moe_edge.Experts*`` in standard ops, so that an exported file runs anywhere as it is.

It computes every expert for every token and multiplies by the gate, which is 0 where an expert was not selected: exact,
free of data-dependent shapes, and slow for many experts. `moe-edge optimize` replaces the node by a better form.
"""

import onnx
import onnx.parser

from moe_spec.experts_op import DOMAIN, NO_LIMIT, ExpertsOp

GATES = """
    experts = Shape<start=0, end=1>(up)
    zero = Constant<value_int=0>()
    one = Constant<value_int=1>()
    axis0 = Constant<value_ints=[0]>()
    axis1 = Constant<value_ints=[1]>()
    axis2 = Constant<value_ints=[2]>()
    all_experts = Squeeze(experts, axis0)
    expert_ids = Range(zero, all_experts, one)
    ids_column = Unsqueeze(ids, axis2)
    hit = Equal(ids_column, expert_ids)
    hit_number = CastLike(hit, weights)
    weights_column = Unsqueeze(weights, axis2)
    hit_weight = Mul(hit_number, weights_column)
    gates_TE = ReduceSum<keepdims=0>(hit_weight, axis1)
    gates_ET = Transpose<perm=[1, 0]>(gates_TE)
    gates = Unsqueeze(gates_ET, axis2)
    hidden_1TH = Unsqueeze(hidden, axis0)
"""

GATED_INPUT = """
    hidden_like_gates = CastLike(hidden_1TH, weights)
    scaled_ETH = Mul(hidden_like_gates, gates)
    x = CastLike(scaled_ETH, hidden)
"""

GATED_OUTPUT = """
    outputs_like_gates = CastLike(outputs_ETH, weights)
    gated_ETH = Mul(outputs_like_gates, gates)
"""

OUT = """
    sum_TH = ReduceSum<keepdims=0>(gated_ETH, axis0)
    out = CastLike(sum_TH, hidden)
"""


def function_of(op: ExpertsOp, opset: int) -> onnx.FunctionProto:
    """The ONNX function that node ``op.op_type`` stands for."""
    inputs = ["hidden", "ids", "weights", "up", "down", *(["up_bias", "down_bias"] if op.biased else [])]
    on_input = (GATED_INPUT, "gated_ETH = Identity(outputs_ETH)")
    before, after = on_input if op.gates_input else ("x = Identity(hidden_1TH)", GATED_OUTPUT)
    body = "\n    ".join((GATES, before, _projections(op), after, OUT))
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {op.op_type} ({", ".join(inputs)}) => (out)
    {{ {body} }}"""
    return onnx.parser.parse_function(text)


def _projections(op: ExpertsOp) -> str:
    """``x`` (1, T, H), or (E, T, H), to outputs_ETH, every expert on every token."""
    lines = _linear("projected", "x", "up", op)
    lines += _split(op) if op.gated else ["value = Identity(projected)"]
    lines += _clamp(op) + _act(op)
    lines += _linear("outputs_ETH", "middle", "down", op)
    return "\n    ".join(["", *lines])


def _linear(result: str, x: str, weight: str, op: ExpertsOp) -> list[str]:
    kernel = weight if op.transposed else f"{weight}_T"
    lines = [] if op.transposed else [f"{kernel} = Transpose<perm=[0, 2, 1]>({weight})"]
    if not op.biased:
        return [*lines, f"{result} = MatMul({x}, {kernel})"]
    return [
        *lines,
        f"{result}_product = MatMul({x}, {kernel})",
        f"{weight}_bias_E1 = Unsqueeze({weight}_bias, axis1)",
        f"{result} = Add({result}_product, {weight}_bias_E1)",
    ]


def _split(op: ExpertsOp) -> list[str]:
    if not op.interleaved:
        return ["gate, value = Split<axis=-1, num_outputs=2>(projected)"]
    return [
        "step = Constant<value_ints=[2]>()",
        "end = Constant<value_ints=[9223372036854775807]>()",
        "gate = Slice(projected, axis0, end, axis2, step)",
        "value = Slice(projected, axis1, end, axis2, step)",
    ]


def _clamp(op: ExpertsOp) -> list[str]:
    """Gate to at most the limit, up to within it on both sides; then the offset of up."""
    lines, activation = [], op.activation
    if activation.limit != NO_LIMIT:
        lines += [
            f"limit_float = Constant<value_float={activation.limit!r}>()",
            "limit = CastLike(limit_float, hidden)",
            "limit_below = Neg(limit)",
        ]
        lines += ["gate_clipped = Clip(gate, , limit)"] if op.gated else []
        lines += ["value_clipped = Clip(value, limit_below, limit)"]
    value = "value" if activation.limit == NO_LIMIT else "value_clipped"
    if op.gated and activation.up_offset:
        lines += [
            f"offset_float = Constant<value_float={activation.up_offset!r}>()",
            "offset = CastLike(offset_float, hidden)",
            f"value_final = Add({value}, offset)",
        ]
    else:
        lines += [f"value_final = Identity({value})"]
    return lines


def _act(op: ExpertsOp) -> list[str]:
    gate = ("gate" if op.activation.limit == NO_LIMIT else "gate_clipped") if op.gated else "value_final"
    lines = {
        "silu": [
            f"alpha_float = Constant<value_float={op.activation.alpha!r}>()",
            "alpha = CastLike(alpha_float, hidden)",
            f"gate_scaled = Mul({gate}, alpha)",
            "gate_sigmoid = Sigmoid(gate_scaled)",
            f"acted = Mul({gate}, gate_sigmoid)",
        ],
        "gelu": [f"acted = Gelu({gate})"],
        "gelu_tanh": [f'acted = Gelu<approximate="tanh">({gate})'],
        "relu": [f"acted = Relu({gate})"],
        "relu2": [f"positive = Relu({gate})", "acted = Mul(positive, positive)"],
    }[op.activation.kind]
    return [*lines, "middle = Mul(acted, value_final)" if op.gated else "middle = Identity(acted)"]
