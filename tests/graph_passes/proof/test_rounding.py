"""A deep graph magnifies rounding: that is told from a fault by the same graph in float64."""

import numpy as np
import onnx
import pytest

from graph_passes.model_file import load_graph
from graph_passes.optimize import optimize
from graph_passes.proof import compare
from graph_passes.proof.feeds import random_batches
from graph_passes.proof.mask import mask_model
from graph_passes.proof.retype import DOUBLED, retyped, save_retyped
from graph_passes.proof.rounding import LARGEST, ROUNDING, own_rounding
from moe_spec.errors import UserError, VerificationError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from moe_spec.runner import error_between
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from tests.graph_passes.block_models import Spec, plan, save
from tests.zoo import RUNNER

KEEP = (1, 3, 6)


def save_deep(path, layers):
    """A MoE block, and behind it ``layers`` of x -> sin(3 x), each of which makes a small difference larger."""
    save(Spec(), path)
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(3, np.float32), "gain"))
    last = model.graph.output[0].name
    for layer in range(layers):
        model.graph.node.append(onnx.helper.make_node("Mul", [last, "gain"], [f"wide_{layer}"]))
        model.graph.node.append(onnx.helper.make_node("Sin", [f"wide_{layer}"], [f"deep_{layer}"]))
        last = f"deep_{layer}"
    model.graph.output[0].name = last
    onnx.save(model, path)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The graph, the reference of a plan for it, and what is left of it by that plan, in another form."""
    root = tmp_path_factory.mktemp("deep")
    path = root / "deep.onnx"
    save_deep(path, layers=5)
    made = plan(Spec(), KEEP, onnx_sha256(path))
    mask_model(path, made, root / "reference")
    optimize(path, root / "out", RUNNER, plan=made, form="dense", prove=False)
    return root


def test_what_rounding_explains_is_proven_and_the_manifest_says_so(deep, tmp_path):
    source = deep / "deep.onnx"
    made = plan(Spec(), KEEP, onnx_sha256(source))
    entries = optimize(source, tmp_path / "out", RUNNER, plan=made, form="dense").details["oracle"]
    beyond = [entry for entry in entries if entry["max_rel"] > compare.TOLERANCE["float32"]]
    assert beyond
    assert all(entry["max_rel"] <= (1 + ROUNDING) * entry["rounding"] for entry in beyond)
    assert all(entry["rounding"] is None for entry in entries if entry not in beyond)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def results(deep):
    """Reference, feeds, and what reference and result give."""
    reference, batches = deep / "reference" / MODEL, random_batches(load_graph(deep / "deep.onnx"), ())
    return reference, batches, RUNNER.run(reference, batches), RUNNER.run(deep / "out" / MODEL, batches)


def test_a_fault_is_not_rounding(deep, tmp_path):
    """Of one part in a thousand, in a single value."""
    reference, batches, expected, got = results(deep)
    assert own_rounding(reference, batches, expected, got, RUNNER, tmp_path) is not None
    got[1]["deep_4"].reshape(-1)[5] += 1e-3
    assert own_rounding(reference, batches, expected, got, RUNNER, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_lucky_is_not_taken_for_the_rounding(deep, tmp_path):
    """Had the reference itself rounded nothing, other last bits would still tell what rounding does."""
    reference, batches, _, got = results(deep)
    save_retyped(reference, tmp_path / MODEL, DOUBLED)
    exact = RUNNER.run(tmp_path / MODEL, [retyped(feeds, DOUBLED) for feeds in batches])
    own = own_rounding(reference, batches, exact, got, RUNNER, tmp_path)
    assert own is not None
    assert 1e-6 < own < LARGEST


def test_a_graph_that_leaves_no_digits_is_not_proven(tmp_path):
    source = tmp_path / "deep.onnx"
    save_deep(source, layers=20)
    made = plan(Spec(), KEEP, onnx_sha256(source))
    with pytest.raises(VerificationError, match=r"^output 'deep_19' of the optimised graph differs"):
        optimize(source, tmp_path / "out", RUNNER, plan=made, form="dense")
    assert {path.name for path in tmp_path.iterdir()} == {"deep.onnx"}


def test_without_kernels_for_float64_nothing_is_explained(deep, tmp_path):
    class Single(OnnxRuntimeRunner):
        def run(self, model, batches, outputs=None):
            if any(array.dtype == np.float64 for array in batches[0].values()):
                raise UserError("no kernel", hint="")
            return super().run(model, batches, outputs)

    reference, batches, expected, got = results(deep)
    assert own_rounding(reference, batches, expected, got, Single(threads=1), tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["exported", "cached", "batched_mm"])
def test_a_doubled_graph_computes_the_same_more_exactly(form, zoo, tmp_path):
    made = getattr(zoo, form)("mixtral")
    source = made / MODEL if made.is_dir() else made
    batches = random_batches(load_graph(source), ())
    save_retyped(source, tmp_path / MODEL, DOUBLED)
    wide = [retyped(feeds, DOUBLED) for feeds in batches]
    for exact, single in zip(RUNNER.run(tmp_path / MODEL, wide), RUNNER.run(source, batches), strict=True):
        assert {array.dtype for array in exact.values()} == {np.dtype(np.float64)}
        assert 0 < error_between(exact["logits"], single["logits"])[1] < LARGEST / 10
