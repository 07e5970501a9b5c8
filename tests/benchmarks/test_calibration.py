from benchmarks.calibration import DENSE, OBSERVED, PLAIN, QUICK_SIZES, SIZES, Row, measure, report


def test_everything_is_timed():
    row = measure(QUICK_SIZES[0], repeats=1)
    assert set(row.median_ms) == {*PLAIN, OBSERVED, DENSE}
    assert min(row.median_ms.values()) > 0


def test_observing_is_compared_with_the_quicker_plain_pass():
    good = Row(SIZES[0], {"eager": 400, "grouped_mm": 500, OBSERVED: 420, DENSE: 3000})
    bad = Row(SIZES[1], {"eager": 600, "grouped_mm": 400, OBSERVED: 560, DENSE: 4000})
    text = report([good, bad], repeats=3, command="python -m benchmarks.calibration")
    assert "| 16 | 2 | 1024 | 400 | 500 | 420 | 3,000 | 1.05 | 7.5 |" in text.splitlines()
    assert text.endswith("Observing takes at most 1.40 times the plain pass (aim: below 1.3).")
