"""Whatever the router, the experts, the plan and the form: the optimised block computes what numpy computes."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.record.prune import prune_block
from graph_passes.writers import WRITERS
from graph_passes.writers import why_not as cannot_write
from moe_spec.errors import UserError
from moe_spec.experts_op import ACTIVATIONS, Activation
from moe_spec.feasibility import Groups
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import FULL, REPLACE, ROWS, LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from tests.graph_passes.block_models import ROUTERS, Spec, compute, plan, save, spec_of, why_not
from tests.graph_passes.block_models.spec import layer_name
from tests.oracle import with_any_means
from tests.zoo import RUNNER

ONE_BY_ONE = ("sparsemixer", "two_argmax")
"""Choices that are two, whatever else a router is like."""

CLAMPED = Activation("silu", 1.702, 7.0, 1.0)

FORMS = ("experts", "batched_mm", "stacked", "masked_loop", "dispatch")
"""Forms that read ids, gates, columns of gates and places."""

WRITTEN = ("auto", *(form for form in WRITERS if form != "trt_moe"))
"""ONNX Runtime has no kernel for TRT_MoE."""


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any router in any of `FORMS`, its sizes, the experts' activation and layout drawn freely where they can be."""
    gated, router = draw(st.booleans()), draw(st.sampled_from(sorted(ROUTERS)))
    kind = ROUTERS[router]
    grouped = "groups" in kind
    free = {
        "experts": 8 if grouped else draw(st.integers(2, 9)),
        "top_k": kind.get(
            "top_k", 2 if kind.get("selection") in ONE_BY_ONE else draw(st.integers(1, 3 if grouped else 2))
        ),
        "hidden": draw(st.sampled_from([4, 8])),
        "width": draw(st.sampled_from([3, 12])),
        "router_bias": draw(st.booleans()),
        "activation": CLAMPED if gated and draw(st.booleans()) else Activation(draw(st.sampled_from(ACTIVATIONS))),
        "gated": gated,
        "interleaved": gated and draw(st.booleans()),
        "transposed": draw(st.booleans()),
        "biased": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    if grouped and kind.get("score") == "sigmoid":
        free["groups"] = Groups(*draw(st.sampled_from([(2, 1), (4, 2), (2, 2)])))
    if kind.get("selection") is None:
        free["scale"] = draw(st.sampled_from([1.0, 2.5]))
    spec = spec_of(draw(st.sampled_from(FORMS)), router, **free)
    assume(why_not(spec) is None)
    return spec


@st.composite
def cases(draw: st.DrawFn) -> tuple[Spec, tuple[int, ...], str, str]:
    spec = draw(specs())
    keep = draw(st.sets(st.integers(0, spec.experts - 1), min_size=1).map(lambda ids: tuple(sorted(ids))))
    router = draw(st.sampled_from([ROWS, REPLACE])) if spec.weights_on == "output" else ROWS
    return spec, keep, router, draw(st.sampled_from(WRITTEN))


def replacing(spec: Spec, keep: tuple[int, ...], source_sha256: str) -> PruningPlan:
    layer = LayerPlan(layer_name(0), spec.experts, spec.top_k, keep, router=FULL)
    return PruningPlan(source_sha256, "by hand", (with_any_means(layer, spec.hidden),))


@given(cases())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_every_block_computes_what_numpy_computes(case):
    spec, keep, router, form = case
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "block.onnx", Path(folder) / "out"
        save(spec, source)
        try:
            made = (
                plan(spec, keep, onnx_sha256(source)) if router == ROWS else replacing(spec, keep, onnx_sha256(source))
            )
        except UserError:
            assume(False)  # groups that cannot choose; test_feasibility has those
        block = prune_block(read_model(source).blocks[0], made.layers[0])
        if form != "auto" and cannot_write(block, form) is not None:
            return  # tests/graph_passes/writers has what a form cannot express
        manifest = optimize(source, out, RUNNER, plan=made, form=form)
        x = np.random.default_rng(spec.seed).standard_normal((5, spec.hidden)).astype(np.float32)
        got = RUNNER.run(out / MODEL, [{"x": x}])[0]["out"]
        full, means = ((), ()) if router == ROWS else ((0,), (made.layers[0].mean_outputs(spec.hidden),))
        assert error_between(compute(spec, x, keep, full=full, means=means), got)[1] <= 1e-5
        assert manifest.blocks[0].experts == len(keep)
