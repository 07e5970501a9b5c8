"""Whatever the router, the experts, the plan and the form: the optimised block computes what numpy computes."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graph_passes.optimize import optimize
from graph_passes.writers import WRITERS
from moe_spec.errors import UserError
from moe_spec.experts_op import ACTIVATIONS, Activation
from moe_spec.feasibility import Groups
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from moe_spec.runner import error_between
from tests.graph_passes.block_models import Spec, compute, plan, save
from tests.zoo import RUNNER

CLAMPED = Activation("silu", 1.702, 7.0, 1.0)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    gated = draw(st.booleans())
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    grouped = score == "sigmoid" and draw(st.booleans())
    kind = draw(st.sampled_from(ACTIVATIONS))
    topk_first = score == "softmax" and draw(st.booleans())
    return Spec(
        experts=8 if grouped else draw(st.integers(2, 9)),
        top_k=draw(st.integers(1, 3)) if grouped else draw(st.integers(1, 2)),
        hidden=draw(st.sampled_from([4, 8])),
        width=draw(st.sampled_from([3, 12])),
        score=score,
        topk_first=topk_first,
        renormalize=not topk_first and draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        router_bias=draw(st.booleans()),
        selection_bias=not topk_first and draw(st.booleans()),
        groups=Groups(*draw(st.sampled_from([(2, 1), (4, 2), (2, 2)]))) if grouped else None,
        activation=CLAMPED if gated and draw(st.booleans()) else Activation(kind),
        gated=gated,
        interleaved=gated and draw(st.booleans()),
        transposed=draw(st.booleans()),
        biased=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Spec, tuple[int, ...], str]:
    spec = draw(specs())
    keep = draw(st.sets(st.integers(0, spec.experts - 1), min_size=1).map(lambda ids: tuple(sorted(ids))))
    return spec, keep, draw(st.sampled_from(["auto", *WRITERS]))


@given(cases())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_every_block_computes_what_numpy_computes(case):
    spec, keep, form = case
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "block.onnx", Path(folder) / "out"
        save(spec, source)
        try:
            made = plan(spec, keep, onnx_sha256(source))
        except UserError:
            assume(False)  # groups that cannot choose; test_feasibility has those
        try:
            manifest = optimize(source, out, RUNNER, plan=made, form=form)
        except UserError:
            if form == "ffn":
                return  # test_writers has what it cannot express
            raise
        x = np.random.default_rng(spec.seed).standard_normal((5, spec.hidden)).astype(np.float32)
        got = RUNNER.run(out / MODEL, [{"x": x}])[0]["out"]
        assert error_between(compute(spec, x, keep), got)[1] <= 1e-5
        assert manifest.blocks[0].experts == len(keep)
