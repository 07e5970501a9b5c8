import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.statistics import KEYS, LayerStatistics, Statistics, merge

REMAKE = "make it again with `moe-edge calibrate`"


def layer(name="layers.0.mlp", scale=1.0, experts=4, groups=None):
    sizes = {"E": experts, "H": 3}
    shapes = {key: tuple(sizes[axis] for axis in row.axes) for key, row in KEYS.items()}
    sums = {key: (np.arange(np.prod(shape)).reshape(shape) + len(key)) * scale for key, shape in shapes.items()}
    return LayerStatistics(name, experts, 2, 10, sums, groups)


def statistics(*layers, data="data"):
    return Statistics("model", (data,), layers or (layer(), layer("layers.1.mlp", groups=Groups(2, 1))))


def assert_equal(left, right):
    assert (left.model_sha256, left.data_sha256) == (right.model_sha256, right.data_sha256)
    for mine, theirs in zip(left.layers, right.layers, strict=True):
        assert dataclasses.replace(mine, sums={}) == dataclasses.replace(theirs, sums={})
        assert mine.sums.keys() == theirs.sums.keys()
        for key in mine.sums:
            np.testing.assert_array_equal(mine[key], theirs[key], strict=True)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics().save(path)
    return path


def header(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["moe_edge"])


def rewrite(path, text=None, **tensors):
    """The same file with another header or other tensors; None takes a tensor away."""
    metadata = {"moe_edge": json.dumps(header(path)) if text is None else text}
    arrays = safetensors.numpy.load_file(path) | tensors
    safetensors.numpy.save_file({name: array for name, array in arrays.items() if array is not None}, path, metadata)


def refusal(path):
    with pytest.raises(UserError) as caught:
        Statistics.load(path)
    return caught.value.what, caught.value.hint


def test_what_is_saved_is_loaded_again(path):
    assert_equal(Statistics.load(path), statistics())


def test_the_same_statistics_are_the_same_bytes(path, tmp_path):
    statistics().save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_shards_add_up_in_the_order_in_which_they_are_merged():
    whole = merge(statistics(layer(scale=1.0), data="a"), statistics(layer(scale=2.0), data="b"))
    assert whole.data_sha256 == ("a", "b")
    assert whole.layers[0].token_count == 20
    for key, row in KEYS.items():
        np.testing.assert_array_equal(whole.layers[0][key], layer(scale=2.0 if row.largest else 3.0)[key])


whole_numbers = st.lists(st.integers(0, 2**40).map(float), min_size=4, max_size=4)


@given(st.lists(whole_numbers, min_size=3, max_size=3))
def test_it_does_not_matter_which_shards_are_merged_first(rows):
    shards = [
        statistics(
            dataclasses.replace(layer(), sums={key: np.array(row) for key in ("tokens", "output_peak")}),
            data=str(index),
        )
        for index, row in enumerate(rows)
    ]
    assert_equal(merge(merge(shards[0], shards[1]), shards[2]), merge(shards[0], merge(shards[1], shards[2])))


def test_shards_of_different_models_are_never_merged():
    other = dataclasses.replace(statistics(), model_sha256="0123456789abcdef")
    message = "statistics of model model cannot be merged with those of 0123456789ab"
    with pytest.raises(UserError, match=re.escape(message)):
        merge(statistics(), other)


def test_shards_with_different_layers_are_never_merged():
    with pytest.raises(
        UserError, match=re.escape("the shards have different MoE layers, or different statistics of them")
    ):
        merge(statistics(layer("a"), data="a"), statistics(layer("b"), data="b"))


def test_no_shard_counts_twice():
    both = merge(statistics(data="a" * 64), statistics(data="b" * 64))
    for shard in (both, statistics(data="b" * 64)):
        with pytest.raises(UserError) as caught:
            merge(both, shard)
        assert (caught.value.what, caught.value.hint) == (
            f"two of the statistics were taken on the same data {shard.data_sha256[0][:12]}, which would count twice",
            "merge each shard once; to share one file among machines, split it before it is calibrated",
        )


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    nothing, foreign = tmp_path / "nothing", tmp_path / "foreign.safetensors"
    assert refusal(nothing) == (f"{nothing} does not exist, expected statistics (safetensors)", "check the path")
    safetensors.torch.save_file({"weight": torch.zeros(3, dtype=torch.bfloat16)}, foreign)
    assert refusal(foreign) == (f"{foreign} holds no statistics", REMAKE)
    foreign.write_text('{"artifact": "plan"}')
    assert refusal(foreign)[0].startswith(f"{foreign} is no complete safetensors file: ")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_cut_file_is_refused(size, path):
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(path)[0].startswith(f"{path} is no complete safetensors file: ")


@pytest.mark.parametrize(("schema", "hint"), [(3, f"update moe-edge, or {REMAKE}"), (1, REMAKE), (None, REMAKE)])
def test_another_schema_is_refused(schema, hint, path):
    rewrite(path, json.dumps(header(path) | {"schema": schema}))
    assert refusal(path) == (f"{path} has statistics schema {schema}, this moe-edge reads 2", hint)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is no complete JSON: "),
        ("[]", "holds a list, expected a JSON object"),
        ('{"artifact": "statistics", "schema": 2}', ": key 'model_sha256' is missing"),
    ],
)
def test_a_spoilt_header_is_refused(text, what, path):
    rewrite(path, text)
    found, hint = refusal(path)
    assert found.startswith(f"{path} {what}".replace(" :", ":"))
    assert hint == REMAKE


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (None, "nothing"),
        (np.zeros(3), "float64[3]"),
        (np.zeros(4, np.float32), "float32[4]"),
    ],
)
def test_a_wrong_tensor_is_refused(tensor, found, path):
    rewrite(path, **{"layers.1.mlp/gate": tensor})
    what = f"{path}: layers[1]: tensor layers.1.mlp/gate holds {found}, expected float64[4]"
    assert refusal(path) == (what, REMAKE)


@pytest.mark.parametrize(
    ("tensor", "found", "expected"),
    [("output", np.zeros((3, 4)), "4, H"), ("logit_gram", np.zeros((4, 3)), "4, 4"), ("output", np.zeros(4), "4, H")],
)
def test_a_matrix_of_another_shape_is_refused(tensor, found, expected, path):
    rewrite(path, **{f"layers.0.mlp/{tensor}": found})
    held = f"float64[{', '.join(map(str, found.shape))}]"
    what = f"{path}: layers[0]: tensor layers.0.mlp/{tensor} holds {held}, expected float64[{expected}]"
    assert refusal(path) == (what, REMAKE)


def test_an_unknown_statistic_is_refused(path):
    values = header(path)
    values["layers"][0]["keys"] = ["mood"]
    rewrite(path, json.dumps(values))
    assert refusal(path) == (f"{path}: layers[0]: 'mood' is no statistic", REMAKE)


@pytest.mark.parametrize(
    ("key", "hint"),
    [("output", "moe-edge calibrate on the checkpoint"), ("output_cosine", "moe-edge calibrate --dense")],
)
def test_a_statistic_that_was_not_taken_is_asked_for_in_vain(key, hint):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(layer(), sums={})[key]
    assert caught.value.what == f"the statistics of layer layers.0.mlp lack {key!r}: {KEYS[key].what}"
    assert caught.value.hint == hint


def test_shards_with_different_statistics_are_never_merged():
    few = dataclasses.replace(layer(), sums={"tokens": np.zeros(4)})
    with pytest.raises(UserError, match="or different statistics of them"):
        merge(statistics(layer(), data="a"), statistics(few, data="b"))


def test_groups_that_are_scored_by_their_best_come_back(tmp_path):
    statistics(layer(groups=Groups(2, 1, scored_by=1))).save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors").layers[0].groups == Groups(2, 1, scored_by=1)
