"""What a float32 value may become, and what each op makes of it: the tables that casts follow.

Three kinds of ops. Products compute in the low precision that was asked for: that is where the time goes. Islands
compute in float32: sums of many squares overflow float16, and exponentials and positions need their digits. All others
follow what they read.

========== =================================================================================================
FREE       a constant, or one in another shape: it takes whatever format its readers compute in
NARROW     computed in low precision, or as good as
WIDE       computed in float32, and done: it may be cast down (a softmax, a norm, gates, inputs of the graph)
STATISTIC  of a norm on the way (a mean, a root): what is scaled by it is scaled in float32
EXACT      must not be rounded: positions, counts, masks of numbers that float16 has not
========== =================================================================================================
"""

import enum
from collections.abc import Collection, Mapping

from moe_spec.experts_op import DOMAIN

CONTRIB = "com.microsoft"


class Kind(enum.Enum):
    """What a value is; see above."""

    FREE = enum.auto()
    NARROW = enum.auto()
    WIDE = enum.auto()
    STATISTIC = enum.auto()
    EXACT = enum.auto()


PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})

ISLANDS: Mapping[str, Kind] = {
    **dict.fromkeys(
        (
            "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
            "ReduceProd", "ReduceSum", "ReduceSumSquare", "Pow", "Reciprocal", "Sqrt", "GlobalAveragePool",
        ),
        Kind.STATISTIC,
    ),
    **dict.fromkeys(("CumSum", "Range"), Kind.EXACT),
}  # fmt: skip
"""What comes out of an island, where that is not `Kind.WIDE`; any op that stands in no table is one."""

FOLLOWERS = frozenset(
    {
        "Abs", "Add", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "ConstantOfShape", "DepthToSpace",
        "DequantizeLinear", "Div", "Dropout", "Elu", "Equal", "Erf", "Expand", "Flatten", "Floor", "Gather",
        "GatherElements", "GatherND", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
        "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg", "OneHot",
        "PRelu", "Pad", "QuantizeLinear", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape",
        "Sigmoid", "Sign", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Sum", "Swish", "Tanh",
        "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip

MOVERS = frozenset(
    {
        "Compress", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity",
        "Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Those of them that compute nothing: what they give is as exact as what they read."""

UNTYPED = frozenset({"Cast", "IsInf", "IsNaN", "Shape", "Size"})
"""They take a value in any format, and make something else of it: nothing is cast for them."""

LOOK_UPS = frozenset({"Gather", "GatherElements", "GatherND"})
"""Of a table by ids, they read weights; by constant ids, they only move a constant."""

FUSED: Mapping[str, Kind] = {
    **dict.fromkeys(
        (
            "Attention", "BiasGelu", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "Gelu",
            "GroupQueryAttention", "MatMulNBits", "MoE", "MultiHeadAttention", "QMoE", "QuickGelu", "RotaryEmbedding",
            "TRT_MoE",
        ),
        Kind.NARROW,
    ),
    **dict.fromkeys(
        ("LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
         "SkipSimplifiedLayerNormalization"),
        Kind.WIDE,
    ),
}  # fmt: skip
"""Ops of one runtime, of which ONNX has no schema: every float operand and result is of one type."""

GATES = {DOMAIN: 2}
"""Operands of ops of a domain that are float32 whatever the others are."""

_ROUNDABLE = frozenset({Kind.NARROW, Kind.WIDE})


def product(kinds: Collection[Kind]) -> Kind:
    """What a product of such values is: narrow, but for the angles of positions.

    >>> product([Kind.FREE, Kind.EXACT]).name, product([Kind.NARROW, Kind.EXACT]).name, product([Kind.WIDE]).name
    ('EXACT', 'NARROW', 'NARROW')
    """
    return Kind.EXACT if Kind.EXACT in kinds and not _ROUNDABLE & set(kinds) else Kind.NARROW


def follow(kinds: Collection[Kind]) -> Kind:
    """What an op gives that follows such values. What is not to be rounded makes it wide, and is used up by it.

    >>> follow([Kind.NARROW, Kind.WIDE]).name, follow([Kind.NARROW, Kind.STATISTIC]).name, follow([Kind.FREE]).name
    ('NARROW', 'WIDE', 'FREE')
    """
    found = set(kinds) - {Kind.FREE}
    if len(found) <= 1:
        return next(iter(found), Kind.FREE)
    return Kind.NARROW if found <= _ROUNDABLE else Kind.WIDE
