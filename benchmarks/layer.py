"""One MoE layer with random weights (softmax, top-k, renormalised, SwiGLU): as ONNX, and as a torch module."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from exporter.experts_function import function_of
from moe_spec.experts_op import DOMAIN, VERSION, Activation, ExpertsOp

OPSET = 20
OP = ExpertsOp(Activation("silu"), gated=True, interleaved=False, transposed=False, biased=False)

_GRAPH = """
<ir_version: 10, opset_import: ["" : {opset}, "{domain}" : {version}]>
layer (float[tokens, {hidden}] hidden) => (float[tokens, {hidden}] out) {{
    logits = Gemm<transB = 1>(hidden, router)
    scores = Softmax<axis = 1>(logits)
    k = Constant<value_ints = [{top_k}]>()
    best, ids = TopK<axis = 1>(scores, k)
    axis = Constant<value_ints = [1]>()
    total = ReduceSum<keepdims = 1>(best, axis)
    gates = Div(best, total)
    out = {domain}.{op}(hidden, ids, gates, up, down)
}}
"""


@dataclasses.dataclass(frozen=True)
class Layer:
    """``experts`` of width F behind a router that selects ``top_k`` a token; E, K, H and F in ``moe_spec``'s words."""

    experts: int
    top_k: int
    hidden: int = 256
    width: int = 512

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """``router`` (E, H), ``up`` (E, 2 F, H) with the gate projection first, ``down`` (E, H, F)."""
        random = np.random.default_rng(0)
        E, H, F = self.experts, self.hidden, self.width
        shapes = {"router": (E, H), "up": (E, 2 * F, H), "down": (E, H, F)}
        return {
            name: (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
            for name, shape in shapes.items()
        }

    def tokens(self, count: int) -> npt.NDArray[np.float32]:
        """(T, H) random hidden states."""
        return np.random.default_rng(1).standard_normal((count, self.hidden), dtype=np.float32)


def save_onnx(layer: Layer, path: Path) -> None:
    """Write the layer as our exporter does: a router, and one node for all experts."""
    text = _GRAPH.format(
        opset=OPSET, domain=DOMAIN, version=VERSION, hidden=layer.hidden, top_k=layer.top_k, op=OP.op_type
    )
    model = onnx.parser.parse_model(text)
    experts = model.graph.node[-1]
    experts.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in OP.to_attributes().items())
    for name, array in layer.weights().items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model.functions.append(function_of(OP, OPSET))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def torch_layer(layer: Layer, experts: str) -> torch.nn.Module:
    """The same as transformers' Mixtral block, with experts implementation ``experts``; takes (B, S, H)."""
    options: dict[str, Any] = {
        "hidden_size": layer.hidden,
        "intermediate_size": layer.width,
        "num_local_experts": layer.experts,
        "num_experts_per_tok": layer.top_k,
        "experts_implementation": experts,
    }
    block: torch.nn.Module = MixtralSparseMoeBlock(MixtralConfig(**options))  # type: ignore[no-untyped-call]
    router, up, down = (torch.from_numpy(array) for array in layer.weights().values())
    block.load_state_dict({"gate.weight": router, "experts.gate_up_proj": up, "experts.down_proj": down})
    return block.eval()
