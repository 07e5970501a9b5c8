import os
import re

import pytest

from moe_spec.errors import UserError
from runtime.measuring.pinning import cores, pinned

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system chooses cores by itself")


def test_so_many_cores_are_left_as_there_are_threads():
    before = cores()
    with pinned(1) as chosen:
        assert chosen == cores() == before[-1:]
    assert cores() == before


def test_threads_on_all_cores_are_not_pinned():
    before = cores()
    with pinned(0) as chosen:
        assert (chosen, cores()) == ((), before)


def test_cores_are_free_again_after_an_error():
    before = cores()
    with pytest.raises(KeyError), pinned(1):
        raise KeyError
    assert cores() == before


def test_more_threads_than_cores_are_refused():
    there = len(cores())
    message = f"{there + 1} threads cannot have a core each: {there} may be used\nhint: --threads {there}, or --no-pin"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"), pinned(there + 1):
        pass
