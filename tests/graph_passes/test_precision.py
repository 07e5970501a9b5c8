"""What may be asked for: formats of experts and of the rest, and which of them a target takes."""

import numpy as np
import pytest

from graph_passes.casts.assign import Formats
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.quantization.quantize import Quantization
from moe_spec.errors import UserError
from moe_spec.formats import FORMATS
from runtime.targets import TARGETS
from tests.graph_passes.block_models import Spec
from tests.graph_passes.readers.proofs import saved
from tests.zoo import RUNNER


@pytest.mark.parametrize(
    ("asked", "what", "hint"),
    [
        (
            {"experts": "int3"},
            "unknown precision 'int3'",
            "did you mean 'int8'? known: bf16, fp16, fp32, fp8, int4, int8, nvfp4",
        ),
        (
            {"rest": "float"},
            "unknown precision 'float'",
            "known: bf16, fp16, fp32, fp8, int4, int8, nvfp4",
        ),
        (
            {"experts": "int4", "block_size": 48},
            "there are no blocks of 48 inputs",
            "--block-size is one of 32, 64, 128",
        ),
        (
            {"experts": "nvfp4", "block_size": 32},
            "nothing is asked for whose scales 32 inputs can share",
            "leave --block-size out, or ask for one of: int8, int4",
        ),
    ],
)
def test_a_wish_that_cannot_be_is_refused(asked, what, hint):
    with pytest.raises(UserError) as refusal:
        Precision.checked(**asked)
    assert (refusal.value.what, refusal.value.hint) == (what, hint)


def test_formats_that_have_scales_quantise():
    assert Precision("int4", block_size=32).quantization == Quantization("int4", 32)
    assert Precision("int8").quantization == Quantization("int8")
    assert Precision("nvfp4", "int8", block_size=32).quantization == Quantization("nvfp4")
    assert Precision(rest="int8").quantization is None


def test_what_is_cast_is_float_and_quantised_experts_compute_as_the_rest_does():
    half, wide, brain = (np.dtype(name) for name in ("float16", "float32", "bfloat16"))
    assert Precision("int4", "fp16").formats == Formats(half, half)
    assert Precision("bf16").formats == Formats(brain, wide)
    assert Precision(None, "fp16").formats == Formats(wide, half)
    assert Precision("fp32", "fp32").formats is None
    assert Precision("int8").formats is None


def test_a_later_run_keeps_what_it_does_not_name():
    before = {"experts": "int4", "rest": None, "block_size": 32}
    assert Precision(rest="fp16").over(before) == Precision("int4", "fp16", 32)
    assert Precision("int8").over({}) == Precision("int8")


def test_what_the_target_lacks_is_refused_before_any_work(tmp_path):
    source = saved(Spec(), tmp_path)
    with pytest.raises(UserError) as refusal:
        optimize(source, tmp_path / "out", RUNNER, precision=Precision("int8"), accepted_precisions=("fp32", "fp16"))
    assert (refusal.value.what, refusal.value.hint) == (
        "the target does not take precision 'int8'",
        "it takes: fp32, fp16",
    )
    assert not (tmp_path / "out").exists()


def test_targets_know_every_format_by_the_same_name():
    known = set().union(*(target.precisions for target in TARGETS))
    assert set(FORMATS.values()) <= known
