import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_spec.errors import UserError
from moe_spec.record import Record, dump, load_record, save_record

REMAKE = "make it again"


def record(**values):
    return Record(values, "plan.json", REMAKE)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    return caught.value.what, caught.value.hint


def test_values_are_taken_by_key_and_type():
    values = record(name="mlp", count=3, share=1, scores=[1.5], none=None)
    assert values.take("name", str) == "mlp"
    assert values.take("count", int) == 3
    assert (values.take("share", float), type(values.take("share", float))) == (1.0, float)
    assert values.take("absent", str, default=None) is None
    assert values.take("none", str, default=None) is None
    assert values.items("scores", float) == (1.5,)
    assert values.record("none") is None


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: record().take("name", str), "key 'name' is missing"),
        (lambda: record(name=3).take("name", str), "key 'name' holds 3, expected str"),
        (lambda: record(count=True).take("count", int), "key 'count' holds True, expected int"),
        (lambda: record(count="3").take("count", int), "key 'count' holds '3', expected int"),
        (lambda: record(share=True).take("share", float), "key 'share' holds True, expected float"),
        (lambda: record(ids=[0, "1"]).items("ids", int), "key 'ids' holds '1', expected int"),
        (lambda: record(ids=[False]).items("ids", int), "key 'ids' holds False, expected int"),
        (lambda: record(layers=[{}, 3]).records("layers"), "layers[1] holds 3, expected an object"),
        (lambda: record(layers={}).records("layers"), "key 'layers' holds {}, expected list"),
        (lambda: record(plan=[]).record("plan"), "key 'plan' holds [], expected dict"),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_key(call, what):
    assert refusal(call) == (f"plan.json: {what}", REMAKE)


def test_a_nested_error_names_its_place():
    (_, second) = record(layers=[{}, {}]).records("layers")
    assert refusal(lambda: second.take("name", str))[0] == "plan.json: layers[1]: key 'name' is missing"


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    share: float | None
    ids: tuple[int, ...] = ()


def test_a_row_is_a_dataclass_of_plain_fields():
    assert record(name="mlp", share=1, ids=[2, 3]).row(Row) == Row("mlp", 1.0, (2, 3))
    assert record(name="mlp", ids=[]).row(Row) == Row("mlp", None)
    assert refusal(lambda: record(share=1.0, ids=[]).row(Row))[0] == "plan.json: key 'name' is missing"
    assert refusal(lambda: record(name="mlp").row(Row))[0] == "plan.json: key 'ids' is missing"


def test_an_artifact_is_sorted_and_indented_and_comes_back(tmp_path):
    path = tmp_path / "plan.json"
    save_record(path, "plan", 1, {"b": 1, "a": [2]})
    assert path.read_text() == '{\n "a": [2],\n "artifact": "plan",\n "b": 1,\n "schema": 1\n}\n'
    assert load_record(path, "plan", 1, REMAKE).take("b", int) == 1


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
strings = st.text() | st.text(alphabet='0123456789,.-+e[]{}:" \n')
values = st.recursive(scalars | strings, lambda inner: st.lists(inner) | st.dictionaries(strings, inner), max_leaves=8)


@settings(max_examples=50)
@given(st.dictionaries(strings, values))
def test_the_text_form_holds_what_was_put_in(payload):
    assert json.loads(dump(payload)) == payload


def test_numbers_that_json_lacks_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float values"):
        save_record(tmp_path / "plan.json", "plan", 1, {"score": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ('{"artifact": "plan", "sch', "is no complete JSON: Unterminated string", REMAKE),
        ("", "is no complete JSON: Expecting value", REMAKE),
        ("[]", "holds a list, expected a JSON object", REMAKE),
        ("{}", "does not say what it is, expected a plan", REMAKE),
        ('{"artifact": "manifest"}', "is a manifest, expected a plan", REMAKE),
        ('{"artifact": "plan"}', "has plan schema None, this moe-edge reads 2", REMAKE),
        ('{"artifact": "plan", "schema": 1}', "has plan schema 1, this moe-edge reads 2", REMAKE),
        (
            '{"artifact": "plan", "schema": 3}',
            "has plan schema 3, this moe-edge reads 2",
            f"update moe-edge, or {REMAKE}",
        ),
    ],
)
def test_what_is_no_artifact_of_this_schema_is_refused(text, what, hint, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    found, mend = refusal(lambda: load_record(path, "plan", 2, REMAKE))
    assert found.startswith(f"{path} {what}")
    assert mend == hint


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe" + json.dumps({}).encode())
    assert refusal(lambda: load_record(path, "plan", 1, REMAKE))[0].startswith(f"{path} is no complete JSON: ")
