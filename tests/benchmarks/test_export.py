import re

from benchmarks.command import python
from benchmarks.export import COSTS, PARTS, experts


def test_every_part_can_be_asked_for():
    assert list(PARTS) == ["large", "others", "experts", "depth"]


def test_a_row_says_what_a_process_of_its_own_took():
    head, _, row = experts(True, 1).splitlines()[-3:]
    assert head == f"| layers | experts | nodes | {' | '.join(COSTS)} |"
    assert re.fullmatch(r"\| 1 \| 8 \| \d+ \| [\d.]+ s \| [\d.]+ s \| [\d,]+ MB \|", row)


def test_time_of_all_cores_is_counted():
    used = python("sum(range(10**6))")
    assert used.cpu_seconds > 0
    assert used.peak_bytes > 1 << 20
