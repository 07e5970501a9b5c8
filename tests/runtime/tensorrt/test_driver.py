"""The calls of the CUDA driver, made for real, into a library of the same names over the host's memory."""

import ctypes
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from moe_spec.errors import UserError
from runtime.tensorrt import driver as drivers
from runtime.tensorrt.driver import Driver, compute_capability_here
from runtime.tensorrt.session import EngineSession
from tests.runtime.tensorrt.gpu_stand_in import Context, Engine, HostDriver, library, manifest

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", Path(__file__).with_name("libcuda_stand_in.c"), "-o", path], check=True, timeout=60
    )
    return path


@pytest.fixture
def cuda(built, monkeypatch):
    """The library; nothing that a test made in it is left."""
    monkeypatch.setattr(drivers, "_LIBRARY", str(built))
    cuda = ctypes.CDLL(str(built))
    yield cuda
    cuda.refuse(0)
    assert cuda.live() == 0


def test_the_capability_of_the_gpu_is_read(cuda):
    assert compute_capability_here() == "8.7"


def test_what_goes_up_comes_down_once_the_stream_was_waited_for(cuda):
    sent = np.arange(12, dtype=np.float32).reshape(3, 4)
    with Driver() as driver:
        address = driver.buffer("x", sent.nbytes)
        driver.upload(address, sent)
        received = driver.download(address, (3, 4), "float32")
        received[:] = -1
        driver.synchronize()
        np.testing.assert_array_equal(received, sent)


def test_a_buffer_stays_where_it_is_until_it_must_grow(cuda):
    with Driver() as driver:
        address = driver.buffer("x", 100)
        assert driver.buffer("x", 0) == driver.buffer("x", 50) == driver.buffer("x", 100) == address
        assert driver.buffer("y", 1) != address
        made = cuda.live()
        driver.buffer("x", 1 << 20)
        assert cuda.live() == made


def test_what_the_driver_refuses_is_told_and_nothing_is_lost(cuda):
    message = "the GPU driver refuses cuMemAlloc_v2: out of memory (2)\nhint: check the GPU with nvidia-smi"
    with Driver() as driver:
        driver.buffer("x", 8)
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            driver.buffer("x", 1 << 41)
        assert driver.buffer("x", 8)


def test_another_thread_uses_the_gpu_once_it_is_made_current(cuda):
    with Driver() as driver:
        cuda.lose_context()
        with pytest.raises(UserError, match="invalid device context"):
            driver.buffer("x", 8)
        thread = threading.Thread(target=driver.make_current)
        thread.start()
        thread.join()
        assert driver.buffer("x", 8)


def test_work_is_captured_launched_and_forgotten(cuda):
    with Driver() as driver:
        graph = driver.capture(lambda: True)
        assert graph is not None
        driver.launch(graph)
        driver.launch(graph)
        assert cuda.launched() == 2
        driver.forget(graph)
        assert driver.capture(lambda: False) is None
        cuda.refuse(1)
        assert driver.capture(lambda: True) is None


def test_a_session_runs_a_thousand_times_over_it_and_gives_all_back(cuda, tmp_path):
    cuda.refuse(1)
    (tmp_path / "model.engine").write_bytes(b"plan")
    trt = library(Engine(Context(HostDriver(), fails=False)))
    with EngineSession(trt, tmp_path / "model.engine", manifest(8, positive=True)) as session:
        made = []
        for count in [1, 2, 8, *(1 + index % 8 for index in range(1000))]:
            x = np.random.default_rng(count).standard_normal((2, count)).astype(np.float32)
            found = session.run({"x": x})
            np.testing.assert_array_equal(found["double"], 2 * x)
            np.testing.assert_array_equal(found["positive"], x[x > 0])
            made.append(cuda.live())
    assert set(made) == {5}  # the context, the stream, and three buffers
