import re

import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from runtime.profiles import ShapeRange, check_profile, default_profile, parse_profile, parse_profiles, show_options

INPUTS = (TensorSpec("x", "float32", ("batch", 3, 8)), TensorSpec("mask", "bool", ("batch", "length")))


def checked(minimum, optimum, maximum):
    profile = parse_profile(minimum, optimum, maximum)
    assert profile is not None
    check_profile(profile, INPUTS)
    return profile


def test_the_syntax_is_that_of_trtexec():
    profile = checked("x:1x3x8,mask:1x1", "x:2x3x8,mask:2x9", "x:4x3x8,mask:4x16")
    assert profile["x"] == ShapeRange((1, 3, 8), (2, 3, 8), (4, 3, 8))
    assert parse_profile(*(option.split("=")[1] for option in show_options(profile).split())) == profile


def test_names_may_hold_colons_and_quotes_as_in_trtexec():
    assert parse_profile(None, "'serving:x':1x2", None) == {"serving:x": ShapeRange((1, 2), (1, 2), (1, 2))}


def test_without_options_there_is_no_profile():
    assert parse_profile(None, None, None) is None


def test_the_default_profile_fits_and_knows_the_batch_by_its_name():
    inputs = (*INPUTS, TensorSpec("past", "float32", (2, "batch", "length")), TensorSpec("fixed", "float32", (2,)))
    profile = default_profile(inputs)
    check_profile(profile, inputs)
    assert profile["mask"] == ShapeRange((1, 1), (8, 32), (64, 128))
    assert profile["past"] == ShapeRange((2, 1, 1), (2, 8, 32), (2, 64, 128))
    assert "fixed" not in profile


def test_the_default_profile_of_a_decoder_begins_with_an_empty_cache():
    ids = TensorSpec("input_ids", "int64", ("batch", "new"))
    mask = TensorSpec("attention_mask", "int64", ("batch", "kept + new"))
    key = TensorSpec("past_key_values.0.key", "float32", ("batch", 2, "kept", 8))
    profile = default_profile((ids, mask, key))
    assert profile["past_key_values.0.key"] == ShapeRange((1, 2, 0, 8), (8, 2, 128, 8), (64, 2, 512, 8))
    assert profile["attention_mask"] == ShapeRange((1, 1), (8, 160), (64, 640))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("x:1x3x8", None, "x:4x3x8"),
            "--optShapes missing: a profile needs all three options, or --optShapes alone\n"
            "hint: give --minShapes, --optShapes and --maxShapes, each with every dynamic input",
        ),
        (
            ("x:1x3x8", "y:1x3x8", "x:4x3x8"),
            "the profile's options name different inputs: --minShapes names x; --optShapes names y; --maxShapes names "
            "x\nhint: name the same inputs in each",
        ),
        (
            (None, "x:1xax8", None),
            "--optShapes=x:1xax8: cannot read 'x:1xax8'\n"
            "hint: give NAME:DIMxDIM,... as trtexec does, e.g. --minShapes=x:1x3x8,y:1",
        ),
        (
            (None, "x:1,x:2", None),
            "--optShapes=x:1,x:2: cannot read 'x:2'\n"
            "hint: give NAME:DIMxDIM,... as trtexec does, e.g. --minShapes=x:1x3x8,y:1",
        ),
        (
            (None, "x:1x3x8", None),
            "the profile leaves out the dynamic input mask[batch, length]\n"
            "hint: give every dynamic input a range in --minShapes, --optShapes and --maxShapes",
        ),
        (
            (None, "x:1x3x8,mask:1x1,y:1", None),
            "the profile names y, but the model's inputs are mask, x\n"
            "hint: name the model's inputs in --minShapes, --optShapes and --maxShapes",
        ),
        (
            (None, "x:1x3,mask:1x1", None),
            "--minShapes gives x the shape 1x3, but the model's input is x[batch, 3, 8]\n"
            "hint: give x 3 dimensions, the fixed ones as they are",
        ),
        (
            ("x:1x3x8,mask:1x1", "x:1x3x8,mask:1x1", "x:1x4x8,mask:1x1"),
            "--maxShapes gives x the shape 1x4x8, but the model's input is x[batch, 3, 8]\n"
            "hint: give x 3 dimensions, the fixed ones as they are",
        ),
        (
            ("x:4x3x8,mask:1x1", "x:2x3x8,mask:1x1", "x:8x3x8,mask:1x1"),
            "the profile of x is 4x3x8, 2x3x8, 8x3x8, expected min <= opt <= max on every axis\n"
            "hint: swap the shapes so that they ascend",
        ),
    ],
)
def test_a_profile_that_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        checked(*options)


def test_options_given_twice_make_two_profiles_in_their_order():
    first, second = parse_profiles(["x:1", "x:2"], ["x:1", "x:4"], ["x:1", "x:8"])
    assert first == {"x": ShapeRange((1,), (1,), (1,))}
    assert second == {"x": ShapeRange((2,), (4,), (8,))}
    assert parse_profiles([], ["x:1", "x:4"], [])[1] == {"x": ShapeRange((4,), (4,), (4,))}
    assert parse_profiles([], [], []) == ()


def test_options_given_in_different_numbers_are_refused():
    message = (
        "the options of profiles are given in different numbers: --minShapes 1, --optShapes 2, --maxShapes 2\n"
        "hint: give each of the three once for every profile"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse_profiles(["x:1"], ["x:1", "x:2"], ["x:1", "x:2"])


def test_profiles_are_numbered_as_trtexec_numbers_them():
    texts = (["x:1", "x:2"], ["x:1", "x:2"], ["x:1", "x:2"])
    assert parse_profiles(*texts, [0, 1]) == parse_profiles(*texts)
    message = (
        "--profile=1 --profile=0 for 2 profiles\nhint: number them 0, 1, ... in their order, or leave --profile out"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse_profiles(*texts, [1, 0])
