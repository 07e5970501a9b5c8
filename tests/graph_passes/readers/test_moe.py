"""``com.microsoft.MoE``: what its attributes mean is what ONNX Runtime computes; every layout gives one record."""

import re

import numpy as np
import onnx
import pytest

from graph_passes.optimize import optimize
from moe_spec.errors import UserError, VerificationError
from moe_spec.experts_op import Activation
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from moe_spec.runner import error_between
from tests.foreign.inputs import UNTRACED
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_models import plan
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import (
    ALL,
    ONE,
    THREE,
    assert_pruned_exactly,
    assert_weights_are_original,
    blocks_of,
    edited,
    node_of,
    said,
    saved,
)
from tests.zoo import RUNNER

SHARP = Activation("silu", float(np.float32(1.5)), 0.75, 0.5)
SPELLINGS = {
    "in turns": {},
    "halves": {"interleaved": False},
    "two weights": {"separate": True},
    "old layout": {"transposed": True},
    "biased": {"biased": True},
    "alpha, beta, limit": {"activation": SHARP},
    "relu": {"gated": False, "activation": Activation("relu")},
    "silu": {"gated": False, "activation": Activation("silu")},
    "gelu is the one with tanh": {"gated": False, "activation": Activation("gelu_tanh"), "biased": True},
    "a Reshape between": {"between": "Reshape"},
    "a Cast between": {"between": "Cast", "dtype": "float16", "renormalize": True},
    "unoptimised": {"unoptimised": True},
}
RUNNABLE = {name: fields for name, fields in SPELLINGS.items() if name not in ("halves", "two weights", "old layout")}
FORMS = ("sorted", "dense", "moe")


@pytest.mark.parametrize("fields", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_gives_the_same_record(tmp_path, fields):
    spec = spec_of("moe", **fields)
    (block,) = blocks_of(saved(spec, tmp_path), "moe")
    assert block.experts.activation == spec.activation
    assert_weights_are_original(spec, block)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fields", RUNNABLE.values(), ids=RUNNABLE.keys())
def test_what_is_read_is_what_onnx_runtime_computes(tmp_path, fields, form):
    assert_pruned_exactly(spec_of("moe", **fields), tmp_path, THREE, form=form)


@pytest.mark.parametrize("router", ["softmax", "softmax_renormalised", "topk_first"])
@pytest.mark.parametrize("keeps", [(ONE, ONE), ((0, 1, 4, 5, 6), ALL)], ids=["1 of 8", "uneven"])
def test_routers_and_plans(tmp_path, router, keeps):
    assert_pruned_exactly(spec_of("moe", router, layers=2), tmp_path, *keeps)


def test_logits_that_are_an_output_too_stay_what_they_were(tmp_path):
    spec = spec_of("moe", returns_logits=True)
    assert_pruned_exactly(spec, tmp_path, THREE, form="moe")
    x = np.random.default_rng(0).standard_normal((3, spec.hidden)).astype(np.float32)
    before, after = (RUNNER.run(tmp_path / path, [{"x": x}])[0] for path in ("block.onnx", f"out/{MODEL}"))
    (logits,) = set(before) - {"out"}
    np.testing.assert_array_equal(before[logits], after[logits])


def test_three_axes_stay_three(tmp_path):
    spec = spec_of("moe", rank=3)
    source = saved(spec, tmp_path)
    for form in FORMS:
        optimize(source, tmp_path / form, RUNNER, plan=plan(spec, THREE, onnx_sha256(source)), form=form)
        x = np.random.default_rng(0).standard_normal((2, 5, spec.hidden)).astype(np.float32)
        assert RUNNER.run(tmp_path / form / MODEL, [{"x": x}])[0]["out"].shape == x.shape


def renamed(attribute: str, value: object):
    """An edit that sets an attribute of the fused node."""

    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "MoE")
        kept = [entry for entry in node.attribute if entry.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])

    return change


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("activation_type", "identity", "activation_type 'identity' is none of relu, silu, gelu, swiglu"),
        ("swiglu_limit", 0.0, "swiglu_limit is 0, expected more than 0"),
        ("swiglu_fusion", 0, "swiglu_fusion 0 needs a gate of its own"),
        ("k", 9, "k is 9, but there are 8 experts"),
        ("k", [2, 2], "attribute k is [2, 2], expected a whole number"),
        ("activation_alpha", "one", "attribute activation_alpha is 'one', expected a number"),
    ],
)
def test_near_misses_are_refused(tmp_path, attribute, value, reason):
    path = edited(spec_of("moe"), tmp_path, renamed(attribute, value))
    assert said(path, "moe") == [f"moe: {reason} (at MoE 'out')"]


def feed_logarithms_of_shares(graph: onnx.GraphProto) -> None:
    """Let the op read log(s / sum(s)) over all experts, s their sigmoid."""
    op, node = onnx.helper.make_node, node_of(graph, "out")
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "experts_axis"))
    before = [
        op("Sigmoid", [node.input[1]], ["all_scores"]),
        op("ReduceSum", ["all_scores", "experts_axis"], ["sum_of_all"], keepdims=1),
        op("Div", ["all_scores", "sum_of_all"], ["shares"]),
        op("Log", ["shares"], ["log_shares"]),
    ]
    node.input[1] = "log_shares"
    nodes = [*list(graph.node)[:-1], *before, graph.node[-1]]
    del graph.node[:]
    graph.node.extend(nodes)


def test_shares_of_all_experts_are_none_of_those_that_are_selected(tmp_path):
    """Unless the op divides by their sum again."""
    assert said(edited(spec_of("moe"), tmp_path, feed_logarithms_of_shares), "moe") == [
        "moe: the logits are logarithms of scores, whose sum over all experts divides the weights (at MoE 'out')"
    ]
    (block,) = blocks_of(edited(spec_of("moe", renormalize=True), tmp_path, feed_logarithms_of_shares), "moe")
    assert (block.router.score, block.router.top_k, block.router.renormalize) == ("sigmoid", 2, True)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    def shorten(graph: onnx.GraphProto) -> None:
        node = node_of(graph, "out")
        stored = next(value for value in graph.initializer if value.name == node.input[4])
        stored.CopyFrom(onnx.numpy_helper.from_array(np.zeros((7, 8, 12), np.float32), stored.name))

    assert said(edited(spec_of("moe"), tmp_path, shorten), "moe") == [
        "moe: the experts' weights have shapes [[8, 24, 8], [7, 8, 12]], which do not fit together (at MoE 'out')"
    ]


def test_use_sparse_mixer_is_a_router_of_its_own(tmp_path):
    (block,) = blocks_of(edited(spec_of("moe"), tmp_path, renamed("use_sparse_mixer", 1)), "moe")
    assert (block.router.score, block.router.jitter_eps) == ("sparsemixer", 0.01)


HINT = "--no-prove writes the result without a proof; compare it where that op runs"
UNPROVABLE = {
    "its CPU kernel has no fc3": ({"separate": True}, None),
    "its CPU kernel wants gate and up in turns (swiglu_fusion 1)": ({"interleaved": False}, None),
    "its CPU kernel ignores use_sparse_mixer": ({}, renamed("use_sparse_mixer", 1)),
    "its CPU kernel gives zeros in float16 unless it renormalises": ({"dtype": "float16"}, None),
}


@pytest.mark.parametrize(("reason", "case"), UNPROVABLE.items())
def test_what_onnx_runtime_does_not_run_is_not_proven_but_written_on_request(tmp_path, reason, case):
    fields, change = case
    spec = spec_of("moe", **fields)
    source = saved(spec, tmp_path) if change is None else edited(spec, tmp_path, change)
    made = plan(spec, THREE, onnx_sha256(source))
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, plan=made)
    assert error.value.what == f"{source} cannot be proven here: ONNX Runtime does not run MoE 'out': {reason}"
    assert error.value.hint == HINT
    assert not (tmp_path / "out").exists()
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=made, prove=False)
    assert manifest.details["oracle"] == []
    assert manifest.blocks[0].experts == 3
    RUNNER.run(tmp_path / "out" / MODEL, [{"x": np.ones((2, spec.hidden), spec.dtype)}])


def test_the_proof_tells_the_two_gelus_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("graph_passes.readers.parts.contrib.KINDS", {"gelu": "gelu"})
    spec = spec_of("moe", gated=False, activation=Activation("gelu_tanh"))
    source = saved(spec, tmp_path)
    with pytest.raises(VerificationError):
        optimize(source, tmp_path / "out", RUNNER, plan=plan(spec, THREE, onnx_sha256(source)), form="sorted")


@pytest.mark.parametrize("name", ["moe_mixtral", "moe_granitemoe", "moe_qwen3_moe"])
def test_the_fused_graph_of_transformers_becomes_one_that_runs_here(zoo, tmp_path, name):
    """Its op has an fc3, which CPUs lack: the graph is not proven, but what comes out is what torch computes."""
    entry, source = FOREIGN[name], zoo.foreign(name)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "refused", RUNNER, form="sorted")
    assert re.fullmatch(
        f"{source} cannot be proven here: ONNX Runtime does not run MoE 'node_MoE_\\d+': its CPU kernel has no fc3",
        error.value.what,
    )
    assert error.value.hint == HINT
    for form in ("sorted", "dense", "moe"):
        manifest = optimize(source, tmp_path / form, RUNNER, form=form, prove=False)
        if form == "moe":  # it has that form already
            assert not manifest.modified
            continue
        for size in UNTRACED:
            example = entry.inputs.random(size)
            feeds = {key: tensor.numpy() for key, tensor in example.items()}
            (got,) = RUNNER.run(tmp_path / form / MODEL, [feeds])[0].values()
            assert error_between(entry.reference(example).numpy(), got)[1] <= 1e-5
