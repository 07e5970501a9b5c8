"""Experts that no input can choose: found without a plan, deleted, and said why; what is not proven stays."""

import dataclasses
import itertools

import numpy as np
import onnx
import pytest

from benchmarks.masked import MASKED
from graph_passes.describe import inspect_model, read_model
from graph_passes.optimize import optimize
from graph_passes.unreachable import Unreachable, find_unreachable, summarise
from graph_passes.weights.weight import from_array
from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from tests.graph_passes.block_models import NAME, ROUTERS, Spec, compute, save
from tests.zoo import RUNNER

DROPPED = (0, 2, 3, 4, 6, 7)
INF = -np.inf


def block_of(path, spec: Spec, bias=None, selection_bias=None):
    """The block of ``spec``, with these vectors in its router."""
    save(spec, path)
    (block,) = read_model(path).blocks
    router = block.router
    if bias is not None:
        router = dataclasses.replace(router, bias_E=from_array(np.asarray(bias, np.float32)))
    if selection_bias is not None:
        router = dataclasses.replace(router, selection_bias_E=from_array(np.asarray(selection_bias, np.float32)))
    return dataclasses.replace(block, router=router)


def vector(value: float, *experts: int) -> list[float]:
    """(8,): ``value`` for ``experts``, 0 for the others."""
    return [value if expert in experts else 0.0 for expert in range(8)]


def found(path, spec: Spec, bias=None, selection_bias=None):
    """(K and ids that stay, reasons, doubts)."""
    findings = find_unreachable(block_of(path / "block.onnx", spec, bias, selection_bias), path)
    plan = None if findings.plan is None else (findings.plan.top_k, findings.plan.keep)
    reasons, doubts = ({item.reason for item in items} for items in (findings.unreachable, findings.not_proven))
    return plan, reasons, doubts


MASKED_OUT = {"its logit is -inf for every input"}
UNBOUNDED = {"not proven: the logits are not bounded, because the router reads no normalised value"}
BIASED = {"not proven: its selection bias may lift it above others"}
SHARED = {"not proven: it has a share in the softmax of the others"}
GROUPED = {"not proven: its routing group may be chosen by it, or need it"}


@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        Spec(renormalize=True),
        Spec(topk_first=True),
        Spec(score="sigmoid"),
        Spec(score="sigmoid", renormalize=True, scale=2.5),
        Spec(score="sqrtsoftplus"),
        Spec(selection="sparsemixer"),
    ],
    ids=["softmax", "renormalised", "top-k first", "sigmoid", "sigmoid renormalised", "sqrtsoftplus", "sparsemixer"],
)
def test_a_logit_of_minus_infinity_is_never_among_the_best(tmp_path, spec):
    assert found(tmp_path, spec, bias=vector(INF, *DROPPED)) == ((2, (1, 5)), MASKED_OUT, set())


def test_a_router_without_a_bias_reaches_everyone(tmp_path):
    assert found(tmp_path, Spec()) == (None, set(), set())


@pytest.mark.parametrize("bias", [-1.0, -50.0])
def test_a_small_bias_is_no_mask(tmp_path, bias):
    assert found(tmp_path, Spec(), bias=vector(bias, *DROPPED)) == (None, set(), set())


def test_a_finite_mask_on_logits_without_bounds_is_not_proven(tmp_path):
    assert found(tmp_path, Spec(), bias=vector(-1e9, *DROPPED)) == (None, set(), UNBOUNDED)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_k_shrinks_to_the_experts_that_have_a_weight(tmp_path, score):
    plan, reasons, doubts = found(tmp_path, Spec(score=score), bias=vector(INF, 0, 1, 2, 3, 4, 6, 7))
    assert plan == (1, (5,))
    assert reasons == {"its weight is 0 for every input, as that of all but 1: K shrinks from 2"}
    assert doubts == set()


def test_a_sparsemixer_keeps_its_k(tmp_path):
    """Its second choice among -inf alone has no meaning."""
    plan, _, doubts = found(tmp_path, Spec(selection="sparsemixer"), bias=vector(INF, 0, 1, 2, 3, 4, 6, 7))
    assert (plan, len(doubts)) == (None, 1)


@pytest.mark.parametrize(
    ("bias", "selection_bias", "expected"),
    [
        (None, vector(-2.0, *DROPPED), ((2, (1, 5)), set())),
        (None, vector(-0.5, *DROPPED), (None, set())),
        (vector(INF, *DROPPED), vector(0.5, 0), (None, BIASED)),
        (vector(INF, *DROPPED), vector(-0.5, *DROPPED), ((2, (1, 5)), set())),
        (vector(INF, *DROPPED), vector(0.0), (None, BIASED)),
    ],
    ids=["below any score", "within reach", "0 plus its bias wins", "-inf and a bias below 0", "a tie at 0"],
)
def test_a_selection_bias_decides_where_it_is_beyond_every_score(tmp_path, bias, selection_bias, expected):
    spec = Spec(score="sigmoid", selection_bias=True)
    plan, _, doubts = found(tmp_path, spec, bias=bias, selection_bias=selection_bias)
    assert (plan, doubts) == expected


@pytest.mark.parametrize(
    ("bias", "selection_bias", "expected"),
    [
        (vector(INF, *DROPPED), vector(9.0, 0), (2, (1, 5))),
        (None, vector(INF, *DROPPED), (2, (1, 5))),
        (None, vector(-1e9, *DROPPED), None),
    ],
    ids=["nothing lifts -inf", "-inf by the bias", "no bound on the logits"],
)
def test_a_selection_bias_on_logits_lifts_none_of_minus_infinity(tmp_path, bias, selection_bias, expected):
    spec = Spec(score="sigmoid", topk_first=True, selection_bias=True)
    plan, reasons, _ = found(tmp_path, spec, bias=bias, selection_bias=selection_bias)
    assert plan == expected
    assert reasons == ({"its logit with its selection bias is -inf for every input"} if expected else set())


def test_a_softmax_of_which_a_share_would_go_keeps_its_experts(tmp_path):
    """A selection bias of -1e9 excludes an expert from the choice, not from the sum in the softmax."""
    spec = Spec(selection_bias=True)
    assert found(tmp_path, spec, selection_bias=vector(-1e9, *DROPPED))[0] is None


def test_the_reason_gives_both_bounds(tmp_path):
    spec = Spec(score="sigmoid", selection_bias=True)
    reasons = found(tmp_path, spec, selection_bias=vector(-2.0, *DROPPED))[1]
    assert reasons == {"its score with its selection bias is at most -1, 2 others have at least 0"}


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        ((0, 1, 4, 5), ((2, (2, 3, 6, 7)), MASKED_OUT, set())),
        ((0, 1, 2, 3), ((2, (4, 5, 6, 7)), MASKED_OUT, set())),
        ((0, 1, 2), (None, set(), GROUPED)),
    ],
    ids=["two of each group", "a whole group", "one left in a group"],
)
def test_groups_keep_the_scores_that_they_had(tmp_path, masked, expected):
    spec = Spec(score="sigmoid", groups=Groups(2, 1))
    assert found(tmp_path, spec, bias=vector(INF, *masked)) == expected


def test_experts_with_one_reason_share_a_line():
    items = [Unreachable("mlp", expert, "masked", "Add 'x'") for expert in (0, 3)]
    assert summarise([*items, Unreachable("mlp", 4, "far below", "Add 'x'")]) == [
        "mlp, experts 0, 3: masked (at Add 'x')",
        "mlp, expert 4: far below (at Add 'x')",
    ]


# --- whole files ----------------------------------------------------------------------------------------------------

REFUSED = ("if.add", "if.constant_if", "scan.add", "nonzero.id_table")
"""Experts in bodies; ids from a table."""

READ = tuple(name for name in MASKED if name not in REFUSED)


@pytest.mark.parametrize("name", READ)
def test_what_cannot_be_reached_is_deleted_and_the_original_is_the_proof(tmp_path, name):
    graph = MASKED[name]
    onnx.save(graph(), tmp_path / "masked.onnx")
    manifest = optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER)
    (block,) = manifest.blocks
    assert block.keep == graph.reachable
    gone = [entry["expert"] for entry in manifest.details["unreachable"]]
    assert sorted([*gone, *block.keep]) == list(range(8))
    changed = {entry.name: entry.modified for entry in manifest.passes}
    assert changed["delete-unreachable"] == bool(gone)
    assert changed["prune-experts"] is False
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_takes_is_refused(tmp_path, name):
    onnx.save(MASKED[name](), tmp_path / "masked.onnx")
    with pytest.raises(UserError, match=r"1 MoE layer\(s\) not recognised"):
        optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER)


def test_bytes_and_nodes_of_each_pass_add_up(tmp_path):
    onnx.save(MASKED["stacked.add"](), tmp_path / "masked.onnx")
    passes = optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER).passes
    assert [entry.name for entry in passes if entry.modified] == ["delete-unreachable", "write-blocks"]
    for before, after in itertools.pairwise(passes):
        assert (before.nodes_after, before.bytes_after) == (after.nodes_before, after.bytes_before)
    deleted = passes[2]
    assert deleted.bytes_before - deleted.bytes_after >= 6 * 3 * 64 * 128 * 4


def test_an_optimised_model_is_not_optimised_again(tmp_path):
    onnx.save(MASKED["stacked.add"](), tmp_path / "masked.onnx")
    optimize(tmp_path / "masked.onnx", tmp_path / "once", RUNNER, form="dense")
    again = inspect_model(tmp_path / "once")
    assert [finding.plan for finding in again.findings] == [None] * len(again.blocks)


def test_a_layer_whose_k_shrinks_computes_what_it_did(tmp_path):
    spec = Spec(router_bias=True)
    save(spec, tmp_path / "block.onnx")
    model = onnx.load(tmp_path / "block.onnx")
    (bias,) = (tensor for tensor in model.graph.initializer if "bias" in tensor.name)
    only = np.where(np.arange(8) == 3, onnx.numpy_helper.to_array(bias).ravel(), INF).astype(np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(only, bias.name))
    onnx.save(model, tmp_path / "block.onnx")
    manifest = optimize(tmp_path / "block.onnx", tmp_path / "out", RUNNER)
    assert [(block.name, block.keep, block.top_k) for block in manifest.blocks] == [(NAME, (3,), 1)]
    x = np.random.default_rng(0).standard_normal((6, spec.hidden)).astype(np.float32)
    got = RUNNER.run(tmp_path / "out" / MODEL, [{"x": x}])[0]["out"]
    np.testing.assert_allclose(got, compute(spec, x, (3,)), atol=1e-5)


def test_an_expert_that_no_id_reaches_is_deleted(tmp_path):
    onnx.save(MASKED["masked_loop.fewer_ids"](), tmp_path / "masked.onnx")
    manifest = optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER)
    assert [block.keep for block in manifest.blocks] == [(0, 1)]
    assert {entry["reason"] for entry in manifest.details["unreachable"]} == {"the router gives ids below 2"}
    assert len(manifest.details["unreachable"]) == 6


def test_a_stack_of_more_experts_than_the_router_has_loses_the_rest(tmp_path):
    save(Spec(form="batched_mm", experts=8), tmp_path / "wide.onnx")
    save(Spec(form="batched_mm", experts=5), tmp_path / "narrow.onnx")
    wide, narrow = (onnx.load(tmp_path / f"{name}.onnx") for name in ("wide", "narrow"))
    stacks = {tensor.name: tensor for tensor in wide.graph.initializer if ".experts." in tensor.name}
    for tensor in narrow.graph.initializer:
        if tensor.name in stacks:
            tensor.CopyFrom(stacks[tensor.name])
    onnx.save(narrow, tmp_path / "block.onnx")
    manifest = optimize(tmp_path / "block.onnx", tmp_path / "out", RUNNER)
    assert [(block.keep, block.experts) for block in manifest.blocks] == [((0, 1, 2, 3, 4), 5)]
    assert {entry["reason"] for entry in manifest.details["unreachable"]} == {"the router gives ids below 5"}


def test_a_plan_may_name_experts_that_no_id_reaches(tmp_path):
    onnx.save(MASKED["masked_loop.fewer_ids"](), tmp_path / "masked.onnx")
    identity = onnx_sha256(tmp_path / "masked.onnx")
    (block,) = read_model(tmp_path / "masked.onnx").blocks
    planned = PruningPlan(identity, "by hand", (LayerPlan(block.name, 8, 1, (1,)),))
    manifest = optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER, plan=planned)
    assert [block.keep for block in manifest.blocks] == [(1,)]


BIASED_KINDS = ("softmax_bias", "sigmoid_bias", "sigmoid_bias_eps", "sigmoid_bias_groups", "sqrtsoftplus")
"""Routers whose selection bias may lift a score of 0, and make its expert one of K with a weight of 0."""


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind not in ("vmoe", *BIASED_KINDS)])
def test_a_masked_expert_goes_whatever_router_masks_it(tmp_path, kind):
    """Proven against the original: what is selected, and with which weight, stays the same."""
    fields = {**ROUTERS[kind], "router_bias": True}
    save(Spec(form="stacked", **fields), tmp_path / "block.onnx")
    model = onnx.load(tmp_path / "block.onnx")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{NAME}.gate.bias")
    gone = (4, 5, 6, 7) if "groups" in kind else (0, 2, 5)
    masked = np.where(np.isin(np.arange(8), gone), INF, onnx.numpy_helper.to_array(bias)).astype(np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(masked, bias.name))
    onnx.save(model, tmp_path / "block.onnx")
    manifest = optimize(tmp_path / "block.onnx", tmp_path / "out", RUNNER)
    assert [block.keep for block in manifest.blocks] == [tuple(e for e in range(8) if e not in gone)]
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5


SILENT = ("stacked.zero_gates", "masked_loop.zero_branch")


@pytest.mark.parametrize("name", SILENT)
def test_experts_whose_gate_is_0_go_and_the_router_keeps_their_share(tmp_path, name):
    onnx.save(MASKED[name](), tmp_path / "masked.onnx")
    manifest = optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER)
    assert {entry["reason"] for entry in manifest.details["unreachable"]} == {"its gate is 0 for every input"}
    (block,) = read_model(tmp_path / "out").blocks
    assert (block.form, block.num_experts, block.keep) == ("dense", 2, (1, 5))
    assert block.router.weight_EH.shape[0] == 8
    again = optimize(tmp_path / "out", tmp_path / "again", RUNNER)
    assert not any(entry.modified for entry in again.passes)


@pytest.mark.parametrize("form", ["dense", "sorted", "gather"])
def test_some_forms_leave_rows_of_a_router_without_an_expert(tmp_path, form):
    onnx.save(MASKED["stacked.zero_gates"](), tmp_path / "masked.onnx")
    manifest = optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER, form=form)
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) < 1e-5
    (block,) = read_model(tmp_path / "out").blocks
    assert (block.form, block.num_experts, block.router.leads_to) == (form, 2, (1, 5))


def test_a_fused_op_cannot_leave_rows_of_a_router_without_an_expert(tmp_path):
    onnx.save(MASKED["stacked.zero_gates"](), tmp_path / "masked.onnx")
    with pytest.raises(UserError) as error:
        optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER, form="moe")
    assert (
        error.value.what
        == "form moe cannot express layer moe.0: some rows of its router lead to no expert of their own"
    )


def test_a_plan_for_a_layer_that_drops_gates_must_drop_the_same(tmp_path):
    onnx.save(MASKED["stacked.zero_gates"](), tmp_path / "masked.onnx")
    layer = LayerPlan("moe.0", 8, 2, (1, 2, 5), router="full")
    planned = PruningPlan(onnx_sha256(tmp_path / "masked.onnx"), "by hand", (layer,))
    with pytest.raises(UserError) as error:
        optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER, plan=planned)
    assert error.value.what == (
        "the plan keeps experts [1, 2, 5] of layer moe.0, whose router drops the gates of all but [1, 5]"
    )
