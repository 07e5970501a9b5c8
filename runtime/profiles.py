"""Optimisation profiles: the range of shapes that an engine must take, in trtexec's syntax.

``--minShapes=x:1x3x8,y:1 --optShapes=... --maxShapes=...``; ``--optShapes`` alone fixes the shapes. Options that are
given several times make several profiles, the first of each the first; ``--profile=0``, ``--profile=1`` may stand
before them, as they do for trtexec.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from moe_spec.decoder import axis_lengths
from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Feeds

BATCH_RANGE = (1, 8, 64)
OTHER_RANGE = (1, 32, 128)
PAST_RANGE = (0, 128, 512)
"""What the default profile lets a leading axis be, any other, and the tokens in a cache: least, best, most."""

_SYNTAX = "give NAME:DIMxDIM,... as trtexec does, e.g. --minShapes=x:1x3x8,y:1"
_SHAPE = re.compile(r"\d+(x\d+)*")

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input: the smallest, the one to be quick at, and the largest."""

    min: Shape
    opt: Shape
    max: Shape


Profile = Mapping[str, ShapeRange]


def parse_profile(minimum: str | None, optimum: str | None, maximum: str | None) -> Profile | None:
    """The profile that the three options give; None where none is given.

    >>> parse_profile("x:1x8", "x:4x8", "x:64x8")
    {'x': ShapeRange(min=(1, 8), opt=(4, 8), max=(64, 8))}
    >>> parse_profile(None, "x:4x8", None)
    {'x': ShapeRange(min=(4, 8), opt=(4, 8), max=(4, 8))}

    Raises:
        UserError: bad syntax, two of the three options, or options that name different inputs.
    """
    given = {"--minShapes": minimum, "--optShapes": optimum, "--maxShapes": maximum}
    if minimum is None and optimum is None and maximum is None:
        return None
    if optimum is not None and minimum is None and maximum is None:
        return fixed_profile("--optShapes", optimum)
    missing = [option for option, text in given.items() if text is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: a profile needs all three options, or --optShapes alone",
            hint="give --minShapes, --optShapes and --maxShapes, each with every dynamic input",
        )
    parsed = {option: _parse(option, text) for option, text in given.items() if text is not None}
    names = {option: sorted(shapes) for option, shapes in parsed.items()}
    if len(set(map(tuple, names.values()))) > 1:
        listing = "; ".join(f"{option} names {', '.join(found)}" for option, found in names.items())
        raise UserError(f"the profile's options name different inputs: {listing}", hint="name the same inputs in each")
    return {name: ShapeRange(*(parsed[option][name] for option in given)) for name in names["--minShapes"]}


def fixed_profile(option: str, text: str) -> Profile:
    """The profile that takes no other shapes than those of ``option``.

    >>> fixed_profile("--maxShapes", "x:64x8")
    {'x': ShapeRange(min=(64, 8), opt=(64, 8), max=(64, 8))}

    Raises:
        UserError: bad syntax.
    """
    return {name: ShapeRange(shape, shape, shape) for name, shape in _parse(option, text).items()}


def parse_profiles(
    minima: Sequence[str], optima: Sequence[str], maxima: Sequence[str], numbers: Sequence[int] = ()
) -> tuple[Profile, ...]:
    """The profiles that the three options give, each as often as it was given; and their ``numbers``, if they were.

    >>> len(parse_profiles(["x:1x8", "x:1x8"], ["x:1x8", "x:64x8"], ["x:1x8", "x:64x8"]))
    2

    Raises:
        UserError: as `parse_profile`, or options that are given in different numbers, or profiles that are numbered
            otherwise than 0, 1, ...
    """
    counts = {
        option: len(texts)
        for option, texts in (("--minShapes", minima), ("--optShapes", optima), ("--maxShapes", maxima))
        if texts
    }
    if len(set(counts.values())) > 1:
        listing = ", ".join(f"{option} {count}" for option, count in counts.items())
        raise UserError(
            f"the options of profiles are given in different numbers: {listing}",
            hint="give each of the three once for every profile",
        )
    parsed = (parse_profile(*texts) for texts in itertools.zip_longest(minima, optima, maxima))
    profiles = tuple(profile for profile in parsed if profile is not None)
    if numbers and list(numbers) != list(range(len(profiles))):
        found = " ".join(f"--profile={number}" for number in numbers)
        raise UserError(
            f"{found} for {len(profiles)} profiles", hint="number them 0, 1, ... in their order, or leave --profile out"
        )
    return profiles


def _parse(option: str, text: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for item in text.split(","):
        name, colon, dims = item.rpartition(":")  # names may hold colons, shapes do not
        name = name.strip("'\"")
        if not colon or not name or not _SHAPE.fullmatch(dims) or name in shapes:
            raise UserError(f"{option}={text}: cannot read {item!r}", hint=_SYNTAX)
        shapes[name] = tuple(int(dim) for dim in dims.split("x"))
    return shapes


def profile_to_json(profile: Profile) -> dict[str, dict[str, list[int]]]:
    """As it stands in manifests."""
    return {name: {key: list(shape) for key, shape in vars(shapes).items()} for name, shapes in profile.items()}


def profile_from_json(rows: Mapping[str, Mapping[str, Sequence[int]]]) -> Profile:
    """What `profile_to_json` wrote.

    >>> profile_from_json(profile_to_json({"x": ShapeRange((1, 8), (4, 8), (64, 8))}))
    {'x': ShapeRange(min=(1, 8), opt=(4, 8), max=(64, 8))}
    """
    return {name: ShapeRange(*(tuple(row[key]) for key in ("min", "opt", "max"))) for name, row in rows.items()}


def dynamic(inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The inputs that have an axis whose length is not fixed."""
    return [spec for spec in inputs if any(isinstance(dim, str) for dim in spec.shape)]


def default_profile(inputs: Sequence[TensorSpec]) -> Profile:
    """``BATCH_RANGE`` for axes that lead an input, ``OTHER_RANGE`` for the rest; one range for all axes of one name.

    What counts the tokens in a decoder's cache has ``PAST_RANGE``, and its mask is as long as both together.

    >>> default_profile([TensorSpec("ids", "int64", ("batch", "sequence"))])["ids"]
    ShapeRange(min=(1, 1), opt=(8, 32), max=(64, 128))
    """
    ranges = [axis_lengths(inputs, *which) for which in zip(BATCH_RANGE, OTHER_RANGE, PAST_RANGE, strict=True)]

    def shape(spec: TensorSpec, lengths: Mapping[str, int]) -> Shape:
        return tuple(dim if isinstance(dim, int) else lengths[dim] for dim in spec.shape)

    return {spec.name: ShapeRange(*(shape(spec, lengths) for lengths in ranges)) for spec in dynamic(inputs)}


def check_profile(profile: Profile, inputs: Sequence[TensorSpec]) -> None:
    """Refuse a profile that does not fit the model's inputs.

    Raises:
        UserError: an input is unknown or left out, has another rank or a fixed axis, or not min <= opt <= max.
    """
    known = {spec.name: spec for spec in inputs}
    unknown = sorted(set(profile) - set(known))
    if unknown:
        raise UserError(
            f"the profile names {', '.join(unknown)}, but the model's inputs are {', '.join(sorted(known))}",
            hint="name the model's inputs in --minShapes, --optShapes and --maxShapes",
        )
    left_out = [_show(spec) for spec in dynamic(inputs) if spec.name not in profile]
    if left_out:
        raise UserError(
            f"the profile leaves out the dynamic input{'s' * (len(left_out) > 1)} {', '.join(left_out)}",
            hint="give every dynamic input a range in --minShapes, --optShapes and --maxShapes",
        )
    for name, shapes in profile.items():
        _check_shapes(known[name], shapes)


def _check_shapes(spec: TensorSpec, shapes: ShapeRange) -> None:
    for option, shape in (("--minShapes", shapes.min), ("--optShapes", shapes.opt), ("--maxShapes", shapes.max)):
        fits = len(shape) == len(spec.shape) and all(
            isinstance(dim, str) or dim == given for dim, given in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise UserError(
                f"{option} gives {spec.name} the shape {dims(shape)}, but the model's input is {_show(spec)}",
                hint=f"give {spec.name} {len(spec.shape)} dimensions, the fixed ones as they are",
            )
    ordered = all(low <= best <= high for low, best, high in zip(shapes.min, shapes.opt, shapes.max, strict=True))
    if not ordered:
        raise UserError(
            f"the profile of {spec.name} is {dims(shapes.min)}, {dims(shapes.opt)}, {dims(shapes.max)}, "
            "expected min <= opt <= max on every axis",
            hint="swap the shapes so that they ascend",
        )


def takes(profile: Profile, feeds: Feeds) -> bool:
    """Whether every input has a shape within its range."""
    return all(
        low <= length <= high
        for name, shapes in profile.items()
        for low, length, high in zip(shapes.min, feeds[name].shape, shapes.max, strict=True)
    )


def first_that_takes(profiles: Sequence[Profile], feeds: Feeds) -> int | None:
    """Number of the profile for ``feeds``: 0 where there are none, as any shape goes then; None where none takes them.

    >>> first_that_takes([], {}), first_that_takes([{}], {})
    (0, 0)
    """
    fitting = (number for number, profile in enumerate(profiles) if takes(profile, feeds))
    return next(fitting, None if profiles else 0)


def options_of(profile: Profile) -> list[str]:
    """The profile as the three options; none for one without dynamic inputs."""

    def option(which: str) -> str:
        shapes = ",".join(f"{name}:{dims(getattr(shapes, which))}" for name, shapes in sorted(profile.items()))
        return f"--{which}Shapes={shapes}"

    return [option(which) for which in ("min", "opt", "max")] if profile else []


def show_options(profile: Profile) -> str:
    """The profile as the three options.

    >>> show_options({"x": ShapeRange((1, 8), (4, 8), (64, 8))})
    '--minShapes=x:1x8 --optShapes=x:4x8 --maxShapes=x:64x8'
    """
    return " ".join(options_of(profile))


def dims(shape: Sequence[int | str]) -> str:
    """A shape in trtexec's syntax.

    >>> dims((1, 8))
    '1x8'
    """
    return "x".join(map(str, shape))


def _show(spec: TensorSpec) -> str:
    return f"{spec.name}[{', '.join(map(str, spec.shape))}]"
