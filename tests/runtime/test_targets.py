import re

import pytest

from moe_spec.errors import UserError
from runtime.backends import BACKENDS
from runtime.targets import CHECKPOINT_TARGETS, TARGETS, find_target, kernels_of, version_fits
from runtime.tensorrt.plan_header import CAPABILITY_BITS


def known(targets):
    return ", ".join(sorted({name for target in targets for name in (target.name, *target.aliases)}))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_row_is_found_by_its_names_and_has_a_backend(target):
    assert find_target(target.name) == target
    assert all(find_target(alias, target.backend) == target for alias in target.aliases)
    assert target.backend in BACKENDS
    assert target.forms
    assert "float32" in target.precisions
    assert target.gigabytes is None or target.gigabytes[0] <= target.gigabytes[1]
    assert not version_fits("1.0", target.versions)
    assert version_fits("99.0", target.versions)


@pytest.mark.parametrize(
    ("version", "orin"),
    [("10.2.0", False), ("10.3.0.30", True), ("10.16.1", True), ("11.3.0.99", False), ("11.4.1", True)],
)
def test_jetson_orin_is_known_to_tensorrt_10_of_jetpack_6_and_again_from_11_4_1(version, orin):
    assert version_fits(version, find_target("jetson-orin").versions) == orin


def test_the_devices_of_the_field_are_there():
    names = "rtx-ampere rtx-ada rtx-blackwell a100 h100 h200 b200 jetson-orin jetson-thor dgx-spark"
    capabilities = ["8.6", "8.9", "12.0", "8.0", "9.0", "9.0", "10.0", "8.7", "11.0", "12.1"]
    assert [find_target(name).compute_capability for name in names.split()] == capabilities


def test_names_are_unique():
    names = [target.name for target in TARGETS]
    assert len(names) == len(set(names))


def test_tensorrt_rtx_is_only_asked_for_capabilities_that_it_has():
    rows = [target for target in TARGETS if target.backend == "tensorrt-rtx"]
    assert {target.compute_capability for target in rows} <= set(CAPABILITY_BITS)
    assert {"8.6", "8.9", "12.0"} <= {target.compute_capability for target in rows}


@pytest.mark.parametrize(("name", "found"), [("sm86", "8.6"), ("sm89", "8.9"), ("sm120", "12.0")])
def test_compute_capabilities_are_names_too(name, found):
    assert find_target(name).compute_capability == found


@pytest.mark.parametrize(
    ("name", "backend", "message"),
    [
        (
            "rtx-adda",
            None,
            f"unknown target 'rtx-adda'\nhint: did you mean 'rtx-ada'? known: {known(TARGETS)}",
        ),
        (
            "h100",
            "tensorrt-rtx",
            "unknown target 'h100' of tensorrt-rtx\nhint: known: dgx-spark, rtx-ada, rtx-ampere, rtx-blackwell, sm120, "
            "sm121, sm80, sm86, sm89",
        ),
        (
            "sm80",
            "tensort",
            "unknown backend 'tensort'\nhint: did you mean 'tensorrt'? known: onnxruntime, tensorrt, tensorrt-rtx",
        ),
    ],
)
def test_an_unknown_target_is_answered_with_the_closest(name, backend, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        find_target(name, backend)


def test_what_moe_edge_writes_itself_runs_with_any_number_of_experts():
    for name in (name for target in TARGETS for name in (target.name, *target.aliases)):
        assert (kernels_of(name).target, kernels_of(name).counts, kernels_of(name).max_top_k) == (name, (), None)


def test_targets_of_checkpoints_are_no_targets_of_graphs():
    for kernels in CHECKPOINT_TARGETS:
        assert kernels_of(kernels.target) is kernels
        assert sorted(kernels.counts) == list(kernels.counts)
        with pytest.raises(UserError, match=f"target {kernels.target} builds from a checkpoint by itself"):
            find_target(kernels.target)


def test_an_unknown_target_of_a_plan_is_answered_with_the_closest():
    with pytest.raises(UserError, match=r"unknown target 'edge-llm-fp8'\nhint: did you mean 'edge-llm-fp16'\?"):
        kernels_of("edge-llm-fp8")
