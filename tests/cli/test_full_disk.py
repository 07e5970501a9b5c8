"""A disk that cannot hold what a verb writes: a readable error, and nothing is left."""

import contextlib
import re

import pytest

from tests.cli.helpers import invoke, leftovers

resource = pytest.importorskip("resource", reason="there are no limits to the size of a file")


@contextlib.contextmanager
def full(largest):
    """No file may be larger, in this process and those that it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def optimized(zoo, tmp_path_factory):
    model = tmp_path_factory.mktemp("full_disk") / "model"
    assert invoke("optimize", zoo.exported("vmoe"), "-o", model, "--target", "rtx-ada", "--no-prove")[0] == 0
    return model


@pytest.mark.parametrize("largest", [0, 50_000])
@pytest.mark.parametrize(
    ("verb", "target"), [("optimize", "sm89"), ("build", "sm89"), ("build", "cpu"), ("bundle", "jetson-orin")]
)
def test_the_disk_is_named_and_nothing_is_left(optimized, tmp_path, verb, target, largest):
    if target == "sm89":
        pytest.importorskip("tensorrt_rtx")
    with full(largest):
        code, out, err = invoke(verb, optimized, "-o", tmp_path / "out", "--target", target)
    assert (code, out) == (1, "")
    assert re.search(message(tmp_path, "out"), err)
    assert leftovers(tmp_path) == set()


def message(directory, name):
    return (
        rf"error: the disk of {directory} cannot hold {name}: File too large\n"
        r"hint: [\d.]+ GB are free there, nothing half-written is left; give another -o, or make room\n$"
    )


def test_so_it_is_for_a_file(optimized, tmp_path):
    with full(100):
        code, out, err = invoke("plan", optimized, "--experts", "0,1,2", "-o", tmp_path / "plan.json")
    assert (code, out) == (1, "")
    assert re.search(message(tmp_path, "plan.json"), err)
    assert leftovers(tmp_path) == set()
