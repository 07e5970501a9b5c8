import dataclasses

import pytest

from benchmarks.forms import ACTIVE, FORMS, GROUPED, NODE, ROUNDED, Row, _check_same, measure, report
from benchmarks.layer import Layer


@pytest.fixture(scope="module")
def rows():
    return [row for experts in (1, 4) for row in measure(experts, [1, 3], repeats=1)]


def test_every_form_that_can_express_the_layer_is_timed(rows):
    assert [(row.layer.experts, row.tokens, row.auto) for row in rows] == [
        (1, 1, "ffn"),
        (1, 3, "ffn"),
        (4, 1, "moe"),
        (4, 3, "sorted"),
    ]
    assert set(rows[0].median_ms) == {*FORMS, *ROUNDED, GROUPED, ACTIVE}
    assert set(rows[2].median_ms) == {*FORMS, *ROUNDED, GROUPED, ACTIVE} - {"ffn"}


def test_the_choice_of_auto_is_compared_with_the_quickest_form_only():
    times = {NODE: 9.0, "dense": 3.0, "sorted": 2.0, "gather": 4.0, GROUPED: 0.5, ACTIVE: 0.1}
    row = Row(Layer(4, 2), tokens=1, median_ms=times, auto="dense")
    assert (row.best, row.ratio) == ("sorted", 1.5)


def test_what_computes_something_else_is_not_timed():
    def other(hidden_TH):
        return hidden_TH + 1

    with pytest.raises(RuntimeError, match=r"^other differs from as exported by .* at 5 tokens$"):
        _check_same({NODE: lambda hidden_TH: hidden_TH, "other": other}, Layer(1, 1).tokens(5))


def test_the_document_has_a_line_for_each_row_and_counts_the_good_ones(rows):
    times = {NODE: 9.0, "dense": 3.0, "sorted": 2.0, "gather": 4.0, GROUPED: 0.5, ACTIVE: 0.1}
    bad = Row(Layer(4, 2), tokens=7, median_ms=times, auto="dense")
    text = report([bad, dataclasses.replace(bad, auto="sorted")], repeats=5, command="python -m benchmarks.forms")
    assert "| 4 | 7 | 9 | 3 | **2** | 4 | - | - | - | - | 0.5 | 0.1 | dense | 1.50 |" in text.splitlines()
    assert "is at most 1.2 in 1 of 2 rows; its highest is 1.50, at\nE'=4 and T=7." in text
