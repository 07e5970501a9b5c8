"""Every form that exporters write x every router x every way to prune: proven, exact, clean, and done once.

Models are written by hand (`block_models`, which shares no code with what is tested) with two layers; `compute` says in
numpy what they must give. `test_foreign.py` does the same to graphs of real exporters.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.record.prune import prune_block
from graph_passes.writers import WRITERS
from graph_passes.writers import why_not as cannot_write
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from tests.engines import FORMS, built
from tests.graph_passes.block_files import ALL, assert_clean, saved
from tests.graph_passes.block_models import FORM_NAMES, ROUTERS, Spec, compute, spec_of
from tests.graph_passes.block_models.spec import layer_name
from tests.zoo import RUNNER

KEEPS = {"3 of 8": ((1, 4, 5), (1, 4, 5)), "1 of 8": ((5,), (5,)), "uneven": ((0, 1, 4, 5, 6), ALL)}
ONLY_TENSORRT = ("trt_moe",)
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


def plan_of(spec: Spec, source: Path, keeps) -> PruningPlan:
    try:
        layers = tuple(
            LayerPlan(layer_name(i), spec.experts, min(spec.top_k, len(keep)), keep, groups=spec.groups)
            for i, keep in enumerate(keeps)
        )
    except UserError as error:
        pytest.skip(f"this router cannot work with these experts: {error.what}")
    return PruningPlan(onnx_sha256(source), "by hand", layers)


def assert_computes(spec: Spec, model: Path, keeps) -> None:
    """The same as numpy, at three numbers of tokens."""
    rng = np.random.default_rng(spec.seed)
    xs_TH = [rng.standard_normal((tokens, spec.hidden)).astype(spec.dtype) for tokens in (1, 5, 37)]
    for x_TH, got in zip(xs_TH, RUNNER.run(model, [{"x": x_TH} for x_TH in xs_TH]), strict=True):
        assert error_between(compute(spec, x_TH, *keeps), got["out"])[1] <= TOLERANCE[spec.dtype]


def weight_count(path: Path) -> int:
    tensors = onnx.load(path).graph.initializer
    return sum(int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type != onnx.TensorProto.INT64)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", FORM_NAMES)
def test_every_form_with_every_router_is_pruned_exactly(form, router, tmp_path):
    spec = spec_of(form, router, layers=2)
    source = saved(spec, tmp_path)
    for label, keeps in KEEPS.items():
        out = tmp_path / label
        try:
            plan = plan_of(spec, source, keeps)
        except pytest.skip.Exception:
            continue  # groups that cannot choose: test_feasibility has them
        manifest = optimize(source, out, RUNNER, plan=plan)
        assert manifest.modified
        assert [entry.experts for entry in manifest.blocks] == [len(keep) for keep in keeps]
        assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= TOLERANCE["float32"]
        assert_computes(spec, out / MODEL, keeps)
        assert_clean(out)
        kept, experts = sum(len(keep) for keep in keeps), spec.layers * spec.experts
        assert weight_count(out / MODEL) <= weight_count(source) * (kept / experts) + 64
        assert_done_once(out, tmp_path / f"{label} again", manifest)


def assert_done_once(first: Path, second: Path, manifest: Manifest) -> None:
    again = optimize(first, second, RUNNER)
    assert not again.modified
    assert (second / MODEL).read_bytes() == (first / MODEL).read_bytes()
    assert [(entry.name, entry.keep, entry.form) for entry in again.blocks] == [
        (entry.name, entry.keep, entry.form) for entry in manifest.blocks
    ]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", FORM_NAMES)
def test_keeping_all_changes_no_byte(form, router, tmp_path):
    spec = spec_of(form, router, layers=2)
    source = saved(spec, tmp_path)
    for name, plan in (("without a plan", None), ("with one", plan_of(spec, source, (ALL, ALL)))):
        manifest = optimize(source, tmp_path / name, RUNNER, plan=plan)
        assert not manifest.modified
        assert (tmp_path / name / MODEL).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", ["experts", "masked_loop"])
def test_every_router_is_written_in_every_form_that_can_express_it(form, router, tmp_path):
    spec = spec_of(form, router)
    source = saved(spec, tmp_path)
    done = []
    for writer in WRITERS:
        (block,) = read_model(source).blocks
        plan = plan_of(spec, source, ((1, 4, 5),))
        if writer in ONLY_TENSORRT or cannot_write(prune_block(block, plan.layers[0]), writer) is not None:
            continue  # tests/graph_passes/writers has the reasons
        optimize(source, tmp_path / writer, RUNNER, plan=plan, form=writer)
        assert_computes(spec, tmp_path / writer / MODEL, ((1, 4, 5),))
        done.append(writer)
    assert "sorted" in done


@pytest.mark.parametrize("router", ROUTERS)
def test_tensorrt_rtx_builds_every_router(router, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'moe-edge[tensorrt-rtx]'")
    spec = spec_of("masked_loop", router)
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan_of(spec, source, ((1, 4, 5),)), accepted=FORMS)
    built(tmp_path / "out")
