import dataclasses
import re

import pytest

from moe_spec.errors import UserError
from runtime.verification.report import LayerParity, OutputParity, TaskAccuracy
from runtime.verification.tolerances import TOLERANCES, load_tolerances
from runtime.verification.verdict import why_it_failed

MEND = 'hint: write rows like {"int8": {"element": 0.05}}, of fp32, fp16, bf16, int8, fp8, w8a8, nvfp4, int4'


def test_what_a_file_does_not_name_stays(tmp_path):
    (tmp_path / "own.json").write_text('{"fp16": {"flips": 1}, "float32": {"flips": 0}}')
    loaded = load_tolerances(tmp_path / "own.json")
    assert loaded["float16"] == dataclasses.replace(TOLERANCES["float16"], flips=1.0)
    assert loaded["float32"] == dataclasses.replace(TOLERANCES["float32"], flips=0.0)
    assert loaded["int8"] == TOLERANCES["int8"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"fp61": {}}', "'fp61' is no precision with a row of tolerances"),
        ('{"int8": null}', "'int8' is no precision with a row of tolerances"),
        ('{"int8": {"elements": 1}}', "int8: unknown tolerance 'elements', known are accuracy, element, flips, margin"),
        ('{"int8": {"element": -1}}', "int8: element is -1.0, expected 0 or more"),
        ('{"int8": {"element": NaN}}', "int8: element is nan, expected 0 or more"),
        ('{"int8": {"element": "1"}}', "int8: key 'element' holds '1', expected float"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused(tmp_path, text, reason):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: {reason}')}\n{re.escape(MEND)}$"):
        load_tolerances(path)


OUTPUT = OutputParity("logits", 3, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0)
LAYER = LayerParity("mlp", 10, 0, 0.0, 1.0, 10, 0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("output", "forced", "reasons"),
    [
        (OUTPUT, True, ()),
        (dataclasses.replace(OUTPUT, examples=0, max_rel=None), True, ()),
        (
            dataclasses.replace(OUTPUT, examples=0, max_rel=None),
            False,
            ("output logits: every example flipped, so no element could be compared",),
        ),
        (
            dataclasses.replace(OUTPUT, forced_max_rel=None),
            True,
            ("output logits: differs by a value that is not finite",),
        ),
        (
            dataclasses.replace(OUTPUT, forced_max_rel=0.5),
            True,
            (
                "output logits: differs by 5.0e-01 of its largest magnitude where the reference's routers choose the "
                "experts, allowed 1.0e-05",
            ),
        ),
    ],
)
def test_elements_are_judged_without_flips_and_under_forced_routing(output, forced, reasons):
    assert why_it_failed([LAYER], [output], None, TOLERANCES["float32"], forced=forced) == reasons


@pytest.mark.parametrize(("high", "fails"), [(0.001, False), (-0.009, False), (-0.02, True)])
def test_a_loss_of_accuracy_counts_where_its_interval_is_beyond_what_is_allowed(high, fails):
    accuracy = TaskAccuracy(0.9, 0.85, -0.05, 1000, -0.08, high)
    reasons = why_it_failed([LAYER], [OUTPUT], accuracy, TOLERANCES["int8"], forced=True)
    assert reasons == (
        (
            "accuracy: 85.0% instead of 90.0% on 1000 examples, a loss of 2.0% to 8.0% with 95 % confidence, "
            "allowed 1.0%",
        )
        if fails
        else ()
    )
