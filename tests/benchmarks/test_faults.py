from benchmarks.faults import Row, candidates, report
from cli.judge import judge


def test_a_fault_and_a_harmless_change_have_their_rows(zoo, tmp_path):
    exported, rows = zoo.exported("mixtral"), []
    made = candidates(exported, None)
    for index in (0, -2):
        change, faulty, make = made[index]
        candidate = make(tmp_path / str(index))
        rows.append(Row("mixtral", change, faulty, judge(candidate, exported, threads=1)))
    assert [row.right for row in rows] == [True, True]
    lines = report(rows, 0, "python -m benchmarks.faults").splitlines()
    assert {"Caught, and found in that layer: **1 of 1** faults.", "Passed: **1 of 1** harmless changes."} <= set(lines)
    swapped = "expert 1 gives what expert 2 should; expert 2 gives what expert 1 should"
    place = "experts 1 and 2 of layer model.layers.1.mlp"
    assert f"| mixtral | two experts swapped | {place}: {swapped} |" in lines
    assert any(line.startswith("| mixtral | half of the experts pruned | PASS | 0 | 0 | ") for line in lines)


def test_a_verdict_that_is_not_what_it_should_be_is_told(zoo, tmp_path):
    exported = zoo.exported("mixtral")
    change, _, make = candidates(exported, None)[0]
    row = Row("mixtral", change, False, judge(make(tmp_path / "candidate"), exported, threads=1))
    assert not row.right
    assert "FAIL **wrong**" in report([row, Row("mixtral", change, True, row.report)], 0, "")
