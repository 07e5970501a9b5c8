import threading
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import MODEL
from runtime.backends import open_session
from runtime.execution import Execution
from runtime.onnxruntime.graph_cache import SUMS, kept_graph
from tests.runtime import tiny
from tests.runtime.tiny import Tiny

VERSION = onnxruntime.__version__
MAPS = Path("/proc/self/maps")


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


@pytest.fixture
def cached(tmp_path):
    return Execution(cache=tmp_path / "cache")


def entries(cached):
    return sorted(cached.cache.iterdir())


def logits(model, execution):
    with open_session(model, 1, execution) as session:
        return session.run({"x": tiny.examples(6)})["logits"]


def test_a_graph_is_optimised_once_and_computes_the_same(model, cached):
    first = logits(model, cached)
    (entry,) = entries(cached)
    before = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    assert set(before) == {MODEL, f"{MODEL}.data", SUMS}
    np.testing.assert_array_equal(logits(model, cached), first)
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    np.testing.assert_allclose(logits(model, Execution()), first, rtol=0, atol=1e-6)


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what a process has mapped")
def test_weights_are_mapped_as_this_cpu_packs_them(cached, tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((128, 128), np.float32), "w")
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 128] x) => (float[n, 128] y) { y = MatMul(x, w) }'
    graph = onnx.parser.parse_model(text)
    graph.graph.initializer.append(weight)
    onnx.save(graph, tmp_path / "product.onnx")
    for _ in range(2):
        with open_session(tmp_path / "product.onnx", 1, cached) as session:
            (entry,) = entries(cached)
            assert f"{entry}/{MODEL}.data" in MAPS.read_text()
            assert (session.run({"x": np.ones((3, 128), np.float32)})["y"] == 128).all()
    assert (entry / f"{MODEL}.data").stat().st_size >= 2 * 128 * 128 * 4


def test_another_model_version_or_provider_is_another_entry(model, cached, tmp_path):
    weights = tiny.write(tmp_path / "other", Tiny(seed=1))
    cuda, second = (Execution("cuda", options, cache=cached.cache) for options in ({}, {"device_id": "1"}))
    keys = [(model / MODEL, cached, VERSION), (model / "observed.onnx", cached, VERSION)]
    keys += [(weights / MODEL, cached, VERSION), (model / MODEL, cached, "2.0")]
    keys += [(model / MODEL, cuda, VERSION), (model / MODEL, second, VERSION)]
    made = [kept_graph(*key, partial(Path.write_text, data=str(index))).read_text() for index, key in enumerate(keys)]
    assert made == [str(index) for index in range(len(keys))]
    assert len(entries(cached)) == len(keys)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda entry: (entry / f"{MODEL}.data").write_bytes(b"0"), f"{MODEL}.data changed"),
        (lambda entry: (entry / MODEL).unlink(), f"{MODEL} changed"),
        (lambda entry: (entry / "more").touch(), "more changed"),
        (lambda entry: (entry / SUMS).write_text("no sums"), "not enough values to unpack (expected 2, got 1)"),
        (lambda entry: (entry / SUMS).write_text(""), f"{SUMS} names no {MODEL}"),
    ],
)
def test_a_damaged_entry_is_made_again_with_a_word(damage, said, model, cached, caplog):
    first = logits(model, cached)
    (entry,) = entries(cached)
    damage(entry)
    np.testing.assert_array_equal(logits(model, cached), first)
    assert caplog.messages == [f"{entry} is damaged ({said}): it is made again"]
    assert entries(cached) == [entry]
    caplog.clear()
    np.testing.assert_array_equal(logits(model, cached), first)
    assert caplog.messages == []


def test_two_that_make_one_entry_at_once_both_get_it(model, cached):
    """Both write, then the first that is done is kept."""
    both, found = threading.Barrier(2), []

    def make(out):
        both.wait(timeout=20)
        out.write_text("graph")

    def open_it():
        found.append(kept_graph(model / MODEL, cached, VERSION, make))

    threads = [threading.Thread(target=open_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (entry,) = entries(cached)
    assert found == [entry / MODEL] * 2
    assert (entry / MODEL).read_text() == "graph"


def test_a_graph_that_cannot_be_made_leaves_no_entry(model, cached):
    def fail(_):
        raise UserError("it is broken", hint="mend it")

    with pytest.raises(UserError, match="it is broken"):
        kept_graph(model / MODEL, cached, VERSION, fail)
    assert entries(cached) == []
