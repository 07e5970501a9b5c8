"""The one table of foreign graphs: which model, which exporter, and what comes out."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.foreign import exporters, masked_loop, nonzero, stacked
from tests.foreign.decoders import block, decoder
from tests.foreign.inputs import HIDDEN_STATES, TEXT, TOKENS, Example, Inputs
from tests.foreign.parts import Mlp, SigmoidBias, SoftmaxTopK, SwiGlu, TopKSoftmax, residual

RENORMALISED = "softmax, top-k, renormalised"
NOT_RENORMALISED = "softmax, top-k"
TOP_K_FIRST = "top-k, softmax"
SIGMOID = "sigmoid, selection bias, top-k, renormalised, scaled"
SOFT = "softmax"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How one graph is made, and what it is.

    Attributes:
        form: the form that its MoE layers have.
        router: the router in words.
        make: gives the torch model, always the same.
        inputs: what it takes.
        export: writes the graph.
        layers: MoE layers that it has.
        top_k: K; there are always eight experts.
        runs: whether ONNX Runtime's CPU provider has all its ops.
    """

    form: str
    router: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    export: Callable[[nn.Module, Inputs, Path], None]
    layers: int = 1
    top_k: int = 2
    runs: bool = True

    def reference(self, example: Example) -> Tensor:
        """The first output of the torch model."""
        with torch.inference_mode():
            outputs = self.make()(**example)
        return outputs if isinstance(outputs, Tensor) else outputs[0]


_DYNAMO = exporters.dynamo
_UNOPTIMIZED = partial(exporters.dynamo, optimize=False)
_TORCHSCRIPT = exporters.torchscript
_TRANSFORMERS = exporters.transformers

_BMM = residual(lambda: stacked.Bmm(SoftmaxTopK()), layers=2)
_MATMUL = residual(lambda: stacked.Matmul(TopKSoftmax()), layers=2)
_EINSUM = residual(lambda: stacked.Einsum(SigmoidBias()), layers=2)
_GPT_OSS = residual(lambda: stacked.GptOss(TopKSoftmax()), layers=2)
_GATE_SLICES = residual(lambda: masked_loop.GateSlices(SoftmaxTopK(renormalize=False), Mlp), layers=2)
_ID_MASKS = residual(lambda: masked_loop.IdMasks(SigmoidBias(), SwiGlu), layers=2)
_STACK = residual(lambda: masked_loop.Stack(TopKSoftmax(), Mlp), layers=2)
_SOFT = residual(lambda: masked_loop.Soft(SwiGlu), layers=1)
_MIXTRAL_LOOP = residual(lambda: nonzero.Mixtral(SoftmaxTopK(), SwiGlu), layers=1)
_DEEPSEEK_LOOP = residual(lambda: nonzero.DeepSeek(SigmoidBias(), Mlp), layers=1)

FOREIGN: Mapping[str, Foreign] = {
    "grouped_mixtral": Foreign("grouped", RENORMALISED, partial(decoder, "mixtral"), TEXT, _TRANSFORMERS, layers=2),
    "grouped_qwen3_moe": Foreign("grouped", RENORMALISED, partial(block, "qwen3_moe"), HIDDEN_STATES, _TRANSFORMERS),
    "grouped_olmoe": Foreign("grouped", NOT_RENORMALISED, partial(block, "olmoe"), HIDDEN_STATES, _TRANSFORMERS),
    "grouped_gpt_oss": Foreign("grouped", TOP_K_FIRST, partial(block, "gpt_oss"), HIDDEN_STATES, _TRANSFORMERS),
    "grouped_phimoe": Foreign("grouped", "sparsemixer", partial(block, "phimoe"), HIDDEN_STATES, _TRANSFORMERS),
    "grouped_deepseek_v2": Foreign(
        "grouped", "softmax, 2 of 4 groups, top-k, scaled", partial(block, "deepseek_v2"), HIDDEN_STATES, _TRANSFORMERS
    ),
    "grouped_deepseek_v3": Foreign(
        "grouped",
        "sigmoid, selection bias, 2 of 4 groups, top-k, renormalised, scaled",
        partial(block, "deepseek_v3"),
        HIDDEN_STATES,
        _TRANSFORMERS,
    ),
    "stacked_bmm": Foreign("stacked", RENORMALISED, _BMM, TOKENS, _DYNAMO, layers=2),
    "stacked_bmm_unoptimized": Foreign("stacked", RENORMALISED, _BMM, TOKENS, _UNOPTIMIZED, layers=2),
    "stacked_bmm_torchscript": Foreign("stacked", RENORMALISED, _BMM, TOKENS, _TORCHSCRIPT, layers=2),
    "stacked_matmul": Foreign("stacked", TOP_K_FIRST, _MATMUL, TOKENS, _DYNAMO, layers=2),
    "stacked_matmul_unoptimized": Foreign("stacked", TOP_K_FIRST, _MATMUL, TOKENS, _UNOPTIMIZED, layers=2),
    "stacked_matmul_torchscript": Foreign("stacked", TOP_K_FIRST, _MATMUL, TOKENS, _TORCHSCRIPT, layers=2),
    "stacked_einsum": Foreign("stacked", SIGMOID, _EINSUM, TOKENS, _DYNAMO, layers=2),
    "stacked_einsum_torchscript": Foreign("stacked", SIGMOID, _EINSUM, TOKENS, _TORCHSCRIPT, layers=2),
    "stacked_gpt_oss": Foreign("stacked", TOP_K_FIRST, _GPT_OSS, TOKENS, _DYNAMO, layers=2),
    "stacked_gpt_oss_torchscript": Foreign("stacked", TOP_K_FIRST, _GPT_OSS, TOKENS, _TORCHSCRIPT, layers=2),
    "masked_loop_gates": Foreign("masked_loop", NOT_RENORMALISED, _GATE_SLICES, TOKENS, _DYNAMO, layers=2),
    "masked_loop_gates_torchscript": Foreign(
        "masked_loop", NOT_RENORMALISED, _GATE_SLICES, TOKENS, _TORCHSCRIPT, layers=2
    ),
    "masked_loop_ids": Foreign("masked_loop", SIGMOID, _ID_MASKS, TOKENS, _DYNAMO, layers=2),
    "masked_loop_ids_torchscript": Foreign("masked_loop", SIGMOID, _ID_MASKS, TOKENS, _TORCHSCRIPT, layers=2),
    "masked_loop_stack": Foreign("masked_loop", TOP_K_FIRST, _STACK, TOKENS, _DYNAMO, layers=2),
    "masked_loop_stack_torchscript": Foreign("masked_loop", TOP_K_FIRST, _STACK, TOKENS, _TORCHSCRIPT, layers=2),
    "masked_loop_soft": Foreign("masked_loop", SOFT, _SOFT, TOKENS, _DYNAMO, top_k=8),
    "masked_loop_soft_torchscript": Foreign("masked_loop", SOFT, _SOFT, TOKENS, _TORCHSCRIPT, top_k=8),
    "nonzero_mixtral": Foreign("nonzero", RENORMALISED, _MIXTRAL_LOOP, TOKENS, _DYNAMO),
    "nonzero_mixtral_torchscript": Foreign("nonzero", RENORMALISED, _MIXTRAL_LOOP, TOKENS, _TORCHSCRIPT),
    "nonzero_deepseek": Foreign("nonzero", SIGMOID, _DEEPSEEK_LOOP, TOKENS, _DYNAMO),
    "sorted_jetmoe": Foreign("sorted", TOP_K_FIRST, partial(decoder, "jetmoe"), TEXT, _DYNAMO, layers=2),
}
