"""What one hand-written MoE model is like: every way in which exporters differ is a field here."""

import dataclasses

import numpy as np

from moe_spec.experts_op import Activation, ExpertsOp
from moe_spec.feasibility import Groups
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan

OPSET = 20
NAME = "layers.0.mlp"
SILU = Activation("silu")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes (the axes of moe_spec), router, experts, form and file; `limits.why_not` says what cannot be.

    Attributes:
        score: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        topk_first: the score is computed over the K best logits.
        own_scales: the weight of each expert is multiplied by its own number in the end (Gemma 4).
        router_bias: added to the logits.
        selection_bias: added to the scores, or to the logits where ``topk_first``, for the choice only.
        groups: a group is scored by its best expert (ReduceMax) or the sum of its two best.
        interleaved: gate and up alternate.
        transposed: weights are (E, in, out).

        selection: ``topk``; ``argmax`` (top-1 without TopK: Switch); ``two_argmax`` (the second with the first masked
            out: NLLB); ``sparsemixer`` (two masked softmaxes: Phi-3.5-MoE).
        eps: of the renormalisation: ``sum + eps``, or ``max(sum, eps)`` where ``eps_clips`` (Ernie 4.5).
        bias_row: the selection bias is stored (1, E).
        group_fill: what experts of other groups are ranked with: -inf (DeepSeek-V3) or 0 (V2).
        jitter_eps: of the sparsemixer.
        weights_on: the weights multiply the experts' ``output`` or their ``input`` (Llama 4).
        capacity: tokens that an expert takes of one sequence; later ones are dropped.

        form: how the experts are written; `kinds.FORMS`.
        gates: how forms that need (T, E) gates get them from ids and weights: ``scatter``, ``equal``, ``onehot``,
            ``where``; or without them: ``mask`` (scores times 0 or 1), ``minus_inf`` (logits scattered into -inf).
        column: how a masked loop takes the gate of one expert: ``slice``, ``gather`` or ``split``.
        total: how a masked loop adds up: ``add`` one by one, ``sum`` (one Sum), ``stack`` (Concat, ReduceSum).
        scatter: how `nonzero` adds up: ``ScatterND`` (by hand), ``index_put`` (torch's index_add_: the same op behind
            Slice, Squeeze and GatherND), ``ScatterElements`` (torch's scatter_add_), ``assign`` (read, add, write).
        hit: where `nonzero` finds the tokens of an expert: ``one_hot`` of all ids, ids ``equal`` to one, or ``gates``.
        einsum: `stacked` multiplies with Einsum instead of MatMul.
        tiled: `stacked` repeats the tokens with Tile and Reshape instead of broadcasting.
        separate: gate and up are two matrices.
        sliced: forms with one matrix an expert take it out of the stacked weights.
        between: what stands between the router and a fused op: ``Reshape``, ``Cast`` or nothing.
        zero_points: `qmoe` gives them instead of leaving them at the middle.

        quantization: of the experts' weights: ``int8``, ``uint8`` (with zero points), ``int4`` (in blocks), ``fp8``,
            ``matmulnbits`` (int4, in blocks).
        block: inputs that share a scale where there are blocks.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        router_cast: what is cast to float32 in other models: ``hidden``, ``logits`` or ``scores``.
        weights_float: the router's weights stay float32 there, and the experts' outputs are cast instead.
        linear: ``gemm`` (transB) or ``matmul`` (of the transposed weight).
        named: weights keep their names.
        unoptimised: as torch.onnx leaves it without its optimiser: transposes, casts and sequences that cancel.
        constants_as_nodes: small constants are Constant nodes.
        rank: of the input: (T, H), or 3 for (B, S, H).
        layers: blocks in a row, each added to what it reads where there are several.
        tied: they share all weights.
        in_function: the block is a model-local function.
        returns_logits: the logits (T, E) of each layer are outputs too, ``logits``, ``logits_1`` ...
    """

    experts: int = 8
    top_k: int = 2
    hidden: int = 8
    width: int = 12
    score: str = "softmax"
    topk_first: bool = False
    own_scales: bool = False
    renormalize: bool = False
    scale: float = 1.0
    router_bias: bool = False
    selection_bias: bool = False
    groups: Groups | None = None
    activation: Activation = SILU
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    seed: int = 0

    selection: str = "topk"
    eps: float = 0.0
    eps_clips: bool = False
    bias_row: bool = False
    group_fill: float = -np.inf
    jitter_eps: float = 0.01
    weights_on: str = "output"
    capacity: int | None = None

    form: str = "experts"
    gates: str = "scatter"
    column: str = "slice"
    total: str = "add"
    scatter: str = "index_put"
    hit: str = "one_hot"
    einsum: bool = False
    tiled: bool = False
    separate: bool = False
    sliced: bool = False
    between: str | None = None
    zero_points: bool = False

    quantization: str | None = None
    block: int = 32
    dtype: str = "float32"
    router_cast: str = "hidden"
    weights_float: bool = False
    linear: str = "gemm"
    named: bool = True
    unoptimised: bool = False
    constants_as_nodes: bool = False
    opset: int = OPSET
    rank: int = 2
    layers: int = 1
    tied: bool = False
    in_function: bool = False
    returns_logits: bool = False

    @property
    def op(self) -> ExpertsOp:
        return ExpertsOp(self.activation, self.gated, self.interleaved and self.gated, self.transposed, self.biased)

    @property
    def one_hot_routed(self) -> bool:
        """The router itself makes (T, E) gates."""
        return self.selection in ("argmax", "two_argmax")


def layer_name(index: int) -> str:
    return f"layers.{index}.mlp"


def plan(spec: Spec, keep: tuple[int, ...], source_sha256: str) -> PruningPlan:
    """The same experts in every layer."""
    top_k = min(spec.top_k, len(keep))
    layers = (LayerPlan(layer_name(i), spec.experts, top_k, keep, groups=spec.groups) for i in range(spec.layers))
    return PruningPlan(source_sha256, "by hand", tuple(layers))
