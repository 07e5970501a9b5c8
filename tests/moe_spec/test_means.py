import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors.numpy

from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.layer_plan import FULL, REPLACE, LayerPlan
from moe_spec.plan import PruningPlan

REMAKE = "make it again with `moe-edge plan`"
MEANS = np.array([[2, 4], [0.5, -1], [0, 0]], np.float32)
LAYER = LayerPlan("layers.1.mlp", 4, 2, (2,), router=REPLACE, means_DH=MEANS)
PLAN = PruningPlan("model", "mone", (LayerPlan("layers.0.mlp", 4, 2, (0, 1)), LAYER))


@pytest.fixture
def path(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def beside(path):
    return path.parent / "plan.means.safetensors"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def put(path, beside, tensors):
    """Let the plan name another file with ``tensors``."""
    safetensors.numpy.save_file(tensors, beside)
    edit(path, means_sha256=sha256_file(beside))


def refusal(path):
    with pytest.raises(UserError) as caught:
        PruningPlan.load(path)
    return caught.value.what, caught.value.hint


def test_what_is_saved_is_loaded_again(path, beside):
    loaded = PruningPlan.load(path)
    assert loaded == PLAN
    assert loaded.means_sha256 == sha256_file(beside)
    np.testing.assert_array_equal(loaded.layers[1].means_DH, MEANS)
    assert loaded.layers[0].means_DH is None
    assert json.loads(path.read_text())["means"] == beside.name


def test_equal_plans_have_equal_means():
    other = dataclasses.replace(LAYER, means_DH=MEANS + 1)
    assert PruningPlan("model", "mone", (PLAN.layers[0], other)) != PLAN


def test_a_plan_without_its_file_is_refused(path, beside):
    beside.unlink()
    expected = f"{beside} does not exist, expected the mean outputs of a plan (safetensors)"
    assert refusal(path) == (expected, "check the path")


def test_a_changed_file_is_refused(path, beside):
    data = bytearray(beside.read_bytes())
    data[-1] ^= 1
    beside.write_bytes(data)
    assert refusal(path) == (f"{beside} is not the file that the plan describes (sha256 differs)", REMAKE)


def test_a_file_that_is_no_safetensors_is_refused(path, beside):
    beside.write_bytes(b"means")
    edit(path, means_sha256=sha256_file(beside))
    what, hint = refusal(path)
    assert what.startswith(f"{beside} is no complete safetensors file: ")
    assert hint == REMAKE


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({}, "{path} holds layers [], expected ['layers.1.mlp']"),
        (
            {"layers.1.mlp": MEANS, "other": MEANS},
            "{path} holds layers ['layers.1.mlp', 'other'], expected ['layers.1.mlp']",
        ),
        ({"layers.1.mlp": MEANS[:2]}, "{path}: layer layers.1.mlp holds F32[2, 2], expected F32[3, H]"),
        ({"layers.1.mlp": MEANS[0]}, "{path}: layer layers.1.mlp holds F32[2], expected F32[3, H]"),
        ({"layers.1.mlp": MEANS.astype(np.float64)}, "{path}: layer layers.1.mlp holds F64[3, 2], expected F32[3, H]"),
    ],
)
def test_a_file_of_something_else_is_refused(path, beside, tensors, what):
    put(path, beside, tensors)
    assert refusal(path) == (what.format(path=beside), REMAKE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(path, beside, value):
    put(path, beside, {"layers.1.mlp": np.where(MEANS == 4, np.float32(value), MEANS)})
    assert refusal(path) == (
        "layer layers.1.mlp has mean outputs [3, 2] for the router 'replace', expected [3, H] finite numbers for "
        "'replace'",
        REMAKE,
    )


def test_a_file_outside_of_the_plans_directory_is_refused(path):
    edit(path, means="../plan.means.safetensors")
    assert refusal(path)[0] == (f"{path} names the file '../plan.means.safetensors', which lies outside {path.parent}")


@pytest.mark.parametrize("key", ["means", "means_sha256"])
def test_a_plan_that_names_no_file_is_refused(path, key):
    edit(path, **{key: 0})
    assert refusal(path) == (f"{path}: key {key!r} holds 0, expected str", REMAKE)


def test_means_go_with_one_router_only():
    expected = "layer layers.1.mlp has mean outputs [3, 2] for the router 'full', expected [3, H] finite numbers"
    with pytest.raises(UserError, match=re.escape(expected)):
        dataclasses.replace(LAYER, router=FULL)


def test_a_plan_from_a_manifest_has_no_means_at_hand():
    with pytest.raises(UserError) as caught:
        dataclasses.replace(LAYER, means_DH=None).mean_outputs(2)
    assert (caught.value.what, caught.value.hint) == (
        "the plan puts mean outputs in the place of experts of layer layers.1.mlp, which are not at hand",
        "give the plan.json that names them: --plan plan.json",
    )
