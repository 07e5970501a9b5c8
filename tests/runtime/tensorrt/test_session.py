"""Sessions of engines, over a stand-in for the GPU and the engine, whose names are checked. TensorRT is not run."""

import contextlib
import dataclasses
import re
from typing import Any, cast

import numpy as np
import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from runtime.tensorrt import session as sessions
from runtime.tensorrt.runtime_cache import RUNTIME_CACHE
from runtime.tensorrt.session import EngineSession, require_gpu
from tests.runtime.tensorrt import gpu_stand_in
from tests.runtime.tensorrt.gpu_stand_in import (
    Cache,
    Config,
    Context,
    Engine,
    HostDriver,
    OutputAllocator,
    library,
    manifest,
)


@contextlib.contextmanager
def opened(tmp_path, *largest, driver=None, rtx=False, fails=False, **details):
    """A session, its driver and its engine."""
    driver = driver or HostDriver()
    engine = Engine(Context(driver, fails))
    (tmp_path / "model.engine").write_bytes(b"plan")
    with EngineSession(
        library(engine, rtx), tmp_path / "model.engine", manifest(*(largest or (8,)), **details), driver
    ) as session:
        yield session, driver, engine


def columns(count, seed=0):
    return np.random.default_rng(seed).standard_normal((2, count)).astype(np.float32)


def check(session, x):
    np.testing.assert_array_equal(session.run({"x": x})["double"], 2 * x)


def test_a_shape_that_comes_again_is_replayed_as_a_graph_on_new_data(tmp_path):
    with opened(tmp_path) as (session, driver, engine):
        for seed in range(5):
            check(session, columns(3, seed))
        assert (engine.context.enqueued, driver.launched) == (3, 3)  # twice, and once while capturing
    assert (driver.freed, driver.closed) == (1, True)


def test_a_graph_is_forgotten_when_a_buffer_moves_and_kept_when_a_smaller_shape_comes(tmp_path):
    with opened(tmp_path) as (session, driver, _):
        for seed, count in enumerate([3, 3, 3, 2, 3, 8, 3, 3, 3]):
            check(session, columns(count, seed))
        assert driver.freed == 1
        assert driver.launched == 3


def test_only_the_latest_graphs_are_kept(tmp_path):
    with opened(tmp_path, 20) as (session, driver, _):
        for count in range(20, 10, -1):
            check(session, columns(count))
            check(session, columns(count))
        assert driver.freed == 10 - sessions._GRAPHS
    assert driver.freed == 10


def test_what_cannot_be_captured_runs_as_before(tmp_path):
    with opened(tmp_path, driver=HostDriver(can_capture=False)) as (session, driver, engine):
        for seed in range(4):
            check(session, columns(3, seed))
        assert (engine.context.enqueued, driver.launched) == (5, 0)


def test_the_first_profile_that_takes_the_shapes_is_chosen(tmp_path):
    with opened(tmp_path, 1, 8) as (session, _, engine):
        used = []
        for count in (1, 5, 8, 1):
            check(session, columns(count))
            used.append(engine.context.profile)
        assert used == [0, 1, 1, 0]


def test_shapes_that_no_profile_takes_are_refused(tmp_path):
    with opened(tmp_path, 1, 8) as (session, _, _):
        message = (
            f"{tmp_path}: the inputs are x [2, 9], the engine was built for x [1, 1] to [4, 1]; x [1, 1] to [4, 8]\n"
            "hint: feed other shapes, or build it again with a wider profile"
        )
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            session.run({"x": columns(9)})


def test_an_output_whose_shape_depends_on_the_data_is_allocated_while_the_engine_runs(tmp_path):
    with opened(tmp_path, positive=True) as (session, driver, _):
        for seed in range(4):
            x = columns(8, seed)
            found = session.run({"x": x})
            np.testing.assert_array_equal(found["positive"], x[x > 0])
            np.testing.assert_array_equal(found["double"], 2 * x)
        assert session.run({"x": -np.ones((1, 4), np.float32)}, ["positive"])["positive"].shape == (0,)
        assert driver.launched == 0


def test_a_failure_on_the_gpu_is_an_error(tmp_path):
    message = f"{tmp_path} failed on the GPU: it gave no reason\nhint: check the GPU with nvidia-smi"
    with opened(tmp_path, fails=True) as (session, _, _), pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        session.run({"x": columns(1)})


def test_weights_are_streamed_as_tensorrt_sees_fit_and_not_captured(tmp_path):
    with opened(tmp_path, weight_streaming=True) as (session, driver, engine):
        for seed in range(4):
            check(session, columns(3, seed))
        assert engine.weight_streaming_budget_v2 == 1234
        assert driver.launched == 0


def test_tensorrt_rtx_captures_by_itself_and_its_kernels_are_kept_beside_the_engine(tmp_path):
    with opened(tmp_path, rtx=True) as (session, driver, engine):
        for seed in range(4):
            check(session, columns(3, seed))
        assert driver.launched == 0
        assert engine.config.cuda_graph_strategy == "whole graph"
    assert (tmp_path / RUNTIME_CACHE).read_bytes() == b"compiled"
    with opened(tmp_path, rtx=True) as (_, _, engine):
        assert engine.config.cache.kernels == b"compiled"


def test_a_plan_that_cannot_be_read_is_refused_and_the_gpu_given_back(tmp_path):
    driver, plan = cast("Any", HostDriver()), tmp_path / "model.engine"
    plan.write_bytes(b"plan")
    message = (
        f"{plan} cannot be deserialised on this GPU: Version tag does not match\nhint: build it again: moe-edge build "
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        EngineSession(library(None), plan, manifest(8), driver)
    assert driver.closed


def test_the_library_itself_says_why_it_cannot_read_a_plan(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    (tmp_path / "model.engine").write_bytes(b"vtrt" + bytes(60))
    with pytest.raises(UserError, match=r"model\.engine cannot be deserialised on this GPU: \w+"):
        EngineSession(trt, tmp_path / "model.engine", manifest(8), cast("Any", HostDriver()))


def test_a_type_that_numpy_does_not_know_is_refused(tmp_path):
    unknown = dataclasses.replace(manifest(8), outputs=(TensorSpec("double", "float3", ("batch", "n")),))
    message = f"{tmp_path}/model.engine: double is float3, which numpy does not know\nhint: pip install ml_dtypes; "
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        EngineSession(library(None), tmp_path / "model.engine", unknown, cast("Any", HostDriver()))


def test_a_version_compatible_engine_may_bring_its_runtime(tmp_path):
    trt, driver = library(Engine(Context(HostDriver(), fails=False))), cast("Any", HostDriver())
    (tmp_path / "model.engine").write_bytes(b"plan")
    with EngineSession(trt, tmp_path / "model.engine", manifest(8, version_compatible=True), driver):
        assert trt.runtime.engine_host_code_allowed


@pytest.mark.parametrize(
    ("found", "details", "opens"),
    [
        ("8.0", {}, True),
        ("8.6", {}, False),
        ("8.6", {"hardware_compatibility": "ampere+"}, True),
        ("12.0", {"hardware_compatibility": "ampere+"}, True),
        ("7.5", {"hardware_compatibility": "ampere+"}, False),
        ("8.6", {"hardware_compatibility": "sameComputeCapability"}, False),
        ("8.6", {"compute_capabilities": ["8.0", "8.6"]}, True),
    ],
)
def test_an_engine_is_opened_on_the_gpus_that_it_was_built_for(tmp_path, monkeypatch, found, details, opens):
    monkeypatch.setattr(sessions, "compute_capability_here", lambda: found)
    if opens:
        require_gpu(manifest(8, **details), tmp_path)
        return
    message = f"{tmp_path} needs a GPU of compute capability 8.0, this one has {found}\nhint: build it again: moe-edge "
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        require_gpu(manifest(8, **details), tmp_path)


def test_the_stand_in_has_no_name_that_the_library_lacks():
    trt = pytest.importorskip("tensorrt_rtx")
    stand_ins = {
        "ICudaEngine": Engine(Context(HostDriver(), fails=False)),
        "IExecutionContext": Context,
        "IRuntimeConfig": Config,
        "IRuntimeCache": Cache,
        "IOutputAllocator": OutputAllocator,
        "Runtime": library(None).runtime,
    }
    assert set(stand_ins) == set(gpu_stand_in.CLASSES)
    for name, stand_in in stand_ins.items():
        own = {"context", "config", "__dict__"}  # what the stand-in remembers
        used = {attribute for attribute in dir(stand_in) if not attribute.startswith("_")} - own
        assert used <= set(dir(getattr(trt, name)))


def test_the_stand_in_is_a_driver():
    from runtime.tensorrt.driver import Driver

    public = {name for name in dir(Driver) if not name.startswith("_")}
    assert public - set(dir(HostDriver())) == {"compute_capability"}
