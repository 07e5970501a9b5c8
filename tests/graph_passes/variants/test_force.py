"""forced.onnx: the routing as an input, the same in every form; what routes by itself is refused."""

import numpy as np
import onnx
import pytest

from graph_passes.optimize import optimize
from graph_passes.variants.force import FORCED
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL, OBSERVED, Manifest
from moe_spec.runner import error_between
from tests.graph_passes.block_models import Spec, plan, weights
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import ALL, THREE, saved
from tests.zoo import RUNNER

TOKENS = 7
SPEC = spec_of("batched_mm", "sigmoid_bias_eps")


def forced(spec: Spec, folder, form: str, keep=THREE) -> Manifest:
    folder.mkdir()
    source = saved(spec, folder)
    made = plan(spec, keep, onnx_sha256(source))
    return optimize(source, folder / "out", RUNNER, plan=made, form=form, forced=True)


def tokens(spec: Spec) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((TOKENS, spec.hidden)).astype(np.float32)


def run_forced(manifest: Manifest, folder, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
    ((first, second),) = manifest.details["forced"].values()
    feeds = {"x": x, first: ids, second: shares}
    return RUNNER.run(folder / "out" / FORCED, [feeds])[0]["out"]


@pytest.mark.parametrize("form", ["sorted", "dense", "gather", "auto"])
@pytest.mark.parametrize("keep", [THREE, (1, 4), ALL], ids=["3 of 8", "as many as K", "all"])
def test_forced_to_what_the_router_chose_nothing_changes(tmp_path, form, keep):
    manifest, x = forced(SPEC, tmp_path / form, form, keep), tokens(SPEC)
    out = tmp_path / form / "out"
    assert manifest.blocks[0].gates is not None
    gates = RUNNER.run(out / OBSERVED, [{"x": x}])[0][manifest.blocks[0].gates]
    ids = np.argsort(-gates, axis=1)[:, :2]
    got = run_forced(manifest, tmp_path / form, x, ids, np.take_along_axis(gates, ids, axis=1))
    wanted = RUNNER.run(out / MODEL, [{"x": x}])[0]["out"]
    assert error_between(wanted, got)[1] <= 1e-6


def test_one_expert_alone_is_that_expert(tmp_path):
    manifest, x = forced(SPEC, tmp_path / "one", "sorted"), tokens(SPEC)
    ids = np.tile(np.array([2, 0]), (TOKENS, 1))
    got = run_forced(manifest, tmp_path / "one", x, ids, np.tile(np.array([1, 0], np.float32), (TOKENS, 1)))
    up, down = weights(SPEC)["up"][THREE[2]], weights(SPEC)["down"][THREE[2]]
    gate, value = np.split(x @ up.T, 2, axis=1)
    assert error_between((gate / (1 + np.exp(-gate)) * value) @ down.T, got)[1] <= 1e-5


def test_forms_agree_on_a_routing_that_no_router_would_choose(tmp_path):
    rng, x = np.random.default_rng(1), tokens(SPEC)
    ids = np.stack([rng.permutation(3)[:2] for _ in range(TOKENS)])
    shares = rng.standard_normal((TOKENS, 2)).astype(np.float32)
    results = []
    for form in ("sorted", "dense", "gather"):
        manifest = forced(SPEC, tmp_path / form, form)
        results.append(run_forced(manifest, tmp_path / form, x, ids, shares))
    assert error_between(results[0], results[1])[1] <= 1e-5
    assert error_between(results[0], results[2])[1] <= 1e-5


def test_weights_are_shared_and_the_model_is_what_it_is_without(tmp_path):
    forced(SPEC, tmp_path / "with", "sorted")
    out = tmp_path / "with" / "out"
    assert {path.name for path in out.iterdir()} >= {FORCED, MODEL, OBSERVED}
    assert {value.name for value in onnx.load(out / MODEL).graph.input} == {"x"}
    Manifest.load(out).check_files(out)


def test_an_op_that_routes_by_itself_cannot_be_forced(tmp_path):
    with pytest.raises(UserError) as error:
        forced(spec_of("batched_mm"), tmp_path / "moe", "moe")
    assert error.value.what == (
        "the routing of layer layers.0.mlp cannot be forced: an op of form moe routes by itself"
    )
    assert error.value.hint == "write the layer in another form: --form sorted, dense or gather"
    assert not (tmp_path / "moe" / "out").exists()
