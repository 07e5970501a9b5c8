"""Experts stacked in 3-D weights: MatMul, bmm and Einsum in any layout are read, near misses are refused."""

import numpy as np
import onnx
import pytest

from graph_passes.record.block import ON_INPUT, ON_OUTPUT
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_models import ROUTERS, Spec
from tests.graph_passes.readers.proofs import (
    ALL,
    CLAMPED,
    ONE,
    THREE,
    assert_pruned_exactly,
    assert_weights_are_original,
    blocks_of,
    edited,
    in_turn,
    let_read,
    node_of,
    said,
    saved,
)

LLAMA4 = ROUTERS["llama4"]

WAYS = {
    "matmul": Spec(form="stacked"),
    "matmul (E, in, out), biased, interleaved": Spec(
        form="stacked", transposed=True, biased=True, interleaved=True, activation=CLAMPED
    ),
    "matmul unoptimised, biased": Spec(form="stacked", unoptimised=True, biased=True),
    "matmul of one expert": Spec(form="stacked", experts=1, top_k=1, biased=True),
    "tokens tiled": Spec(form="stacked", tiled=True, interleaved=True, separate=True),
    "einsum, biased": Spec(form="stacked", einsum=True, biased=True),
    "einsum (E, in, out)": Spec(form="stacked", einsum=True, transposed=True, gated=False),
    "half, weighed in float": Spec(form="stacked", dtype="float16", weights_float=True),
    "gates on the input": Spec(form="stacked", **LLAMA4),
    "gates on the input, broadcast": Spec(form="stacked", **{**LLAMA4, "tiled": False}),
    "gates on the input, einsum": Spec(form="stacked", einsum=True, **{**LLAMA4, "tiled": False}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_record_holds_the_models_weights(tmp_path, way):
    spec = WAYS[way]
    (block,) = blocks_of(saved(spec, tmp_path), "stacked")
    assert_weights_are_original(spec, block)
    assert (block.name, block.hidden.name, block.out.name) == ("layers.0.mlp", "x", "out")
    assert block.weights_on == (ON_INPUT if spec.weights_on == "input" else ON_OUTPUT)
    assert block.experts.activation == spec.activation


@pytest.mark.parametrize("way", ["matmul (E, in, out), biased, interleaved", "einsum, biased", "gates on the input"])
@pytest.mark.parametrize("keeps", [(THREE, ONE), (ALL, THREE)], ids=str)
def test_layers_are_pruned_exactly(tmp_path, way, keeps):
    spec = WAYS[way]
    layered = Spec(**{**vars(spec), "layers": 2})
    manifest = assert_pruned_exactly(layered, tmp_path, *keeps)
    assert [entry.keep for entry in manifest.blocks] == list(keeps)
    untouched = [entry.form for entry, keep in zip(manifest.blocks, keeps, strict=True) if keep == ALL]
    assert set(untouched) <= {"stacked"}


def _halves(stored, gated):
    return np.split(stored.numpy(), 2, axis=-1) if gated else [stored.numpy()]


MODULES = {
    "Bmm": lambda state: [*_halves(state["gate_up_proj"], gated=True), state["down_proj"].numpy()],
    "Matmul": lambda state: [state["w1"].mT.numpy(), state["w2"].mT.numpy()],
    "Einsum": lambda state: [state[name].numpy() for name in ("gate", "up", "down")],
    "GptOss": lambda state: [
        state["gate_up_proj"][..., 0::2].numpy(),
        state["gate_up_proj"][..., 1::2].numpy(),
        state["down_proj"].numpy(),
    ],
    "Llama4TextExperts": lambda state: [*_halves(state["gate_up_proj"], gated=True), state["down_proj"].numpy()],
}


@pytest.mark.parametrize("name", [name for name in FOREIGN if name.startswith("stacked")])
def test_a_real_export_is_read_with_the_weights_of_its_model(zoo, name):
    modules = [module for module in FOREIGN[name].make().modules() if type(module).__name__ in MODULES]
    blocks = blocks_of(zoo.foreign(name), "stacked")
    assert len(blocks) == len(modules) == FOREIGN[name].layers
    for block, module in zip(blocks, modules, strict=True):
        wanted = MODULES[type(module).__name__](module.state_dict())
        experts = block.experts
        found = [weight for weight in (experts.gate_EHF, experts.up_EHF, experts.down_EFH) if weight is not None]
        for weight, array in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(weight.load(), array)


def _transpose(output: str, perm: list[int]):
    def change(graph: onnx.GraphProto) -> None:
        node_of(graph, output).attribute[0].ints[:] = perm

    return change


def _equation(output: str, equation: str):
    def change(graph: onnx.GraphProto) -> None:
        node_of(graph, output).attribute[0].s = equation.encode()

    return change


EINSUM = Spec(form="stacked", einsum=True)
NEAR_MISSES = {
    "gates of tokens for experts": (
        WAYS["matmul"],
        _transpose("transpose", [0, 1]),
        "Mul lets the axis (E) meet (T) (at Mul 'mul_1')",
    ),
    "a sum over tokens": (
        WAYS["matmul"],
        lambda graph: let_read(graph, "out", 1, np.asarray([1])),
        "ReduceSum sums the axes (E, T, H) over another than E (at ReduceSum 'out')",
    ),
    "a sum over no axis": (
        WAYS["matmul"],
        lambda graph: let_read(graph, "out", 1, np.asarray([], np.int64)),
        "ReduceSum sums the axes (E, T, H) over another than E (at ReduceSum 'out')",
    ),
    "experts of another layer's shape": (
        WAYS["matmul"],
        lambda graph: let_read(graph, "bmm_1", 1, np.zeros((8, 24, 8), np.float32)),
        "the experts' weights have shapes [[8, 8, 12], [8, 8, 12], [8, 24, 8]], which do not fit together "
        "(at MatMul 'bmm_1')",
    ),
    "fewer experts than the router has": (
        WAYS["matmul"],
        in_turn(
            lambda graph: let_read(graph, "bmm", 1, np.zeros((4, 8, 24), np.float32)),
            lambda graph: let_read(graph, "bmm_1", 1, np.zeros((4, 12, 8), np.float32)),
        ),
        "the router chooses among 8 experts that read 8 channels, there are 4 that read 8 (at MatMul 'bmm_1')",
    ),
    "a bias for every token alike": (
        Spec(form="stacked", biased=True),
        lambda graph: let_read(graph, "add", 1, np.zeros(24, np.float32)),
        "a projection is no product with the weights of all experts (at Add 'add')",
    ),
    "biases behind an input gate": (
        WAYS["gates on the input"],
        in_turn(
            lambda graph: graph.node.insert(13, onnx.helper.make_node("Add", ["bmm", "b"], ["biased"])),
            lambda graph: graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 1, 24), np.float32), "b")),
            lambda graph: let_read(graph, "split", 0, "biased"),
        ),
        "the weights multiply the input of experts that have biases (at MatMul 'bmm_1')",
    ),
    "an einsum over tokens": (
        EINSUM,
        _equation("out", "ue,teh->uh"),
        "Einsum sums over an axis that is not the experts' (at Einsum 'out')",
    ),
    "an einsum without a result": (
        EINSUM,
        _equation("out", "te,teh"),
        "Einsum has the equation 'te,teh', expected one letter for each axis (at Einsum 'out')",
    ),
    "an activation that nobody knows": (
        WAYS["matmul"],
        lambda graph: setattr(node_of(graph, "sigmoid"), "op_type", "Tanh"),
        "Mul ends no known activation (at Mul 'mul')",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_refused_with_the_node(tmp_path, miss):
    spec, change, reason = NEAR_MISSES[miss]
    assert said(edited(spec, tmp_path, change), "stacked") == [f"stacked: {reason}"]


def save_text(path, body: str) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 20]> model (float[n, 4] x) => (float[n, 4] out) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), path)


def test_attention_by_stacked_weights_is_no_moe(tmp_path):
    """Heads stacked as JAX models do: a contraction over heads and their channels, but no FFN."""
    save_text(
        tmp_path / "model.onnx",
        """
        zero = Constant<value_float = 0.5>()
        shape = Constant<value_ints = [2, 4, 3]>()
        back = Constant<value_ints = [2, 3, 4]>()
        w_in = Expand(zero, shape)
        w_out = Expand(zero, back)
        heads = Einsum<equation = "th,nhd->tnd">(x, w_in)
        scores = Einsum<equation = "tnd,snd->nts">(heads, heads)
        weights = Softmax<axis = -1>(scores)
        mixed = Einsum<equation = "nts,snd->tnd">(weights, heads)
        out = Einsum<equation = "tnd,ndh->th">(mixed, w_out)
        """,
    )
    assert said(tmp_path / "model.onnx", "stacked") == []
