import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from hypothesis.extra import numpy as arrays

from moe_spec.decoder import as_past, complete, has_cache, positions_of
from moe_spec.manifest import TensorSpec

IDS = TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))
POSITIONS = TensorSpec("position_ids", "int64", ("batch_size", "sequence_length"))
MASK = TensorSpec("attention_mask", "int32", ("batch_size", "past_sequence_length + sequence_length"))
KEY = TensorSpec("past_key_values.0.key", "float16", ("batch_size", 2, "past_sequence_length", 8))
STATE = TensorSpec("past_key_values.1.conv_state", "float32", ("batch_size", 32, 3))
DECODER = (IDS, POSITIONS, MASK, KEY, STATE)


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 1)), st.data())
def test_positions_count_what_is_no_padding(mask_BT, data):
    sequence = data.draw(st.integers(1, mask_BT.shape[1]))
    positions_BS = positions_of(mask_BT, sequence)
    for mask_T, found_S in zip(mask_BT, positions_BS, strict=True):
        seen = [sum(mask_T[:end]) for end in range(1, len(mask_T) + 1)]
        assert found_S.tolist() == [max(count - 1, 0) for count in seen[-sequence:]]


def test_ids_alone_begin_with_an_empty_cache():
    feeds = complete(DECODER, {"input_ids": np.ones((3, 4), np.int64)})
    assert {name: (array.shape, array.dtype.name) for name, array in feeds.items()} == {
        "input_ids": ((3, 4), "int64"),
        "position_ids": ((3, 4), "int64"),
        "attention_mask": ((3, 4), "int32"),
        "past_key_values.0.key": ((3, 2, 0, 8), "float16"),
        "past_key_values.1.conv_state": ((3, 32, 3), "float32"),
    }
    assert feeds["attention_mask"].all()
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3]] * 3
    assert not feeds["past_key_values.1.conv_state"].any()


def test_positions_follow_the_mask_that_is_given():
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    feeds = complete(DECODER, {"input_ids": np.ones((2, 4), np.int64), "attention_mask": mask})
    assert feeds["attention_mask"] is mask
    assert feeds["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_what_a_call_leaves_is_the_past_of_the_next():
    key = np.ones((1, 2, 5, 8), np.float16)
    past = as_past({"logits": np.zeros((1, 1, 9)), "present.0.key": key})
    assert list(past) == ["past_key_values.0.key"]
    mask = np.ones((1, 6), np.int32)
    feeds = complete(DECODER, {"input_ids": np.ones((1, 1), np.int64), "attention_mask": mask, **past})
    assert feeds["position_ids"].tolist() == [[5]]
    assert feeds["past_key_values.0.key"] is key


def test_other_models_get_what_they_are_given():
    feeds = {"input_ids": np.ones((1, 2), np.int64)}
    assert not has_cache((IDS, POSITIONS))
    assert complete((IDS, POSITIONS), feeds) == feeds
