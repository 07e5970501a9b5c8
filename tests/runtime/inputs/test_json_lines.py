import re

import numpy as np
import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from runtime.inputs import json_lines
from runtime.inputs.json_lines import read_json_lines

INPUTS = (
    TensorSpec("ids", "int64", ("n", "s")),
    TensorSpec("scale", "float32", ("n",)),
    TensorSpec("small", "int8", ("n",)),
    TensorSpec("on", "bool", ("n",)),
)
HINT = 'write a JSON object a line, such as {"input_ids": [5, 7, 2]}; long examples go into an .npz'


@pytest.fixture
def read(tmp_path):
    def batches(text, size=2):
        path = tmp_path / "a.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return list(read_json_lines(path, INPUTS, size))

    return batches


def test_lines_become_batches_of_the_inputs_types(read):
    lines = [f'{{"ids": [{index}, 7], "scale": {index}, "on": true}}' for index in range(3)]
    first, second = read("\n\n".join(lines))  # blank lines are none
    assert {name: array.dtype.name for name, array in first.items()} == {
        "ids": "int64",
        "scale": "float32",
        "on": "bool",
    }
    np.testing.assert_array_equal(first["ids"], [[0, 7], [1, 7]])
    np.testing.assert_array_equal(second["scale"], [2.0])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "{path} holds no example"),
        ("\n  \n", "{path} holds no example"),
        ("{}", "{path} line 1 names no input"),
        ("[5, 7]", "{path} line 1 holds a list, expected a JSON object"),
        ('{"ids": "5 7"}', "{path} line 1: ids holds text, expected numbers for int64"),
        ('{"ids": [0.5]}', "{path} line 1: ids holds fractions, expected numbers for int64"),
        ('{"ids": []}', "{path} line 1: ids holds nothing, expected numbers for int64"),
        ('{"ids": null}', "{path} line 1: ids holds other values, expected numbers for int64"),
        ('{"scale": true}', "{path} line 1: scale holds true and false, expected numbers for float32"),
        ('{"on": 1}', "{path} line 1: on holds whole numbers, expected numbers for bool"),
        ('{"small": 300}', "{path} line 1: small fits no int8: Python integer 300 out of bounds for int8"),
        ('{"ids": [5]}\n{"ids": [', "{path} line 2 is no complete JSON: Expecting value: line 1 column 10 (char 9)"),
    ],
)
def test_what_is_no_example_is_named_with_its_line(text, what, read, tmp_path):
    with pytest.raises(UserError) as refusal:
        read(text)
    assert (refusal.value.what, refusal.value.hint) == (what.format(path=tmp_path / "a.jsonl"), HINT)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        (
            '{"ids": [5, 7]}\n\n{"ids": [5]}',
            "line 3 holds {'ids': [1]}, the first one {'ids': [2]}",
            "run examples of one length at a time",
        ),
        (
            '{"ids": [5]}\n{"ids": [5], "scale": 1}',
            "line 2 holds {'ids': [1], 'scale': []}, the first one {'ids': [1]}",
            "run examples of one length at a time",
        ),
        ('{"x": [5]}', "line 1: the model has no input 'x'", "name the lists like the model's inputs"),
    ],
)
def test_other_names_and_lengths_are_refused(text, what, hint, read, tmp_path):
    with pytest.raises(UserError) as refusal:
        read(text)
    assert (refusal.value.what.replace(f"{tmp_path}/a.jsonl", "").strip(), refusal.value.hint) == (what, hint)


@pytest.mark.parametrize("text", ['{"ids": [[1, 2], [3]]}', '{"ids": ' + "[" * 100_000, b'{"ids": "\xff"}'])
def test_ragged_deep_and_broken_lines_are_refused(text, read, tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/a.jsonl line 1"):
        read(text)


def test_a_line_is_not_read_whole_where_it_is_too_long(read, tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE", 20)
    read('{"ids": [1, 2, 3]}\n')
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/a.jsonl line 2 has more than 20 bytes\n"):
        read('{"ids": [1, 2, 3]}\n{"ids": [1, 2, 3, 4]}\n')


def test_a_missing_file_is_named(tmp_path):
    message = f"{tmp_path}/a.jsonl does not exist, expected examples (.jsonl)\nhint: check the path"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        list(read_json_lines(tmp_path / "a.jsonl", INPUTS, 2))
