import re

import pytest

from moe_spec.errors import UserError
from runtime.backends import BACKENDS
from runtime.targets import TARGETS, find_target
from runtime.tensorrt.plan_header import CAPABILITY_BITS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_row_is_found_by_its_names_and_has_a_backend(target):
    assert find_target(target.name) == target
    assert all(find_target(alias, target.backend) == target for alias in target.aliases)
    assert target.backend in BACKENDS
    assert target.forms
    assert "float32" in target.precisions


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
            "unknown target 'rtx-adda'\nhint: did you mean 'rtx-ada'? known: a100, cpu, h100, h200, jetson-orin, "
            "jetson-thor, onnxruntime-cpu, rtx-ada, rtx-ampere, rtx-blackwell, sm110, sm120, sm80, sm86, sm87, sm89, "
            "sm90",
        ),
        (
            "h100",
            "tensorrt-rtx",
            "unknown target 'h100' of tensorrt-rtx\nhint: known: rtx-ada, rtx-ampere, rtx-blackwell, sm120, sm80, "
            "sm86, sm89",
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
