"""Whether a model fits a device: what it takes there, and what building it takes, against the memory there is."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moe_spec.decoder import PAST, PRESENT
from moe_spec.errors import UserError
from moe_spec.manifest import FILE_NAME, Manifest, TensorSpec
from runtime.backend import ENGINE
from runtime.engine import profiles_of
from runtime.model_dir import model_bytes, model_file, why_not_buildable
from runtime.profiles import Profile, check_profile, default_profile
from runtime.targets import TARGETS, TENSORRT, Target, find_target

GIGABYTE = 10**9
YES, SOME, NO, UNKNOWN = "yes", "the larger", "no", "unknown"

_BUILD_FACTOR = 3
"""Memory of a build over bytes of weights: TensorRT-RTX 1.7 took 3.7 GB for 1.21 GB of experts, 1.0 GB for 0.40."""

_BITS = {
    "float64": 64, "int64": 64, "uint64": 64, "float32": 32, "int32": 32, "uint32": 32, "float16": 16, "bfloat16": 16,
    "int4": 4, "uint4": 4, "float4e2m1": 4,
}  # fmt: skip
"""Of an element; 8 where it is not named."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A model on a target. Everything is in bytes, at the largest shapes asked for.

    Attributes:
        target: its name.
        why_not: reasons in the model against this target; empty: it takes the model.
        weights: of the graph or the engine.
        cache: what a decoder takes from its cache and gives back to it.
        tensors: the other inputs and outputs.
        activations: what the engine keeps between its layers, as TensorRT said when it built it; None before a build.
        build: what a build takes.
        memory: of the smallest and of the largest such device; None where that is not known.
        shared: whether it is built on the device, from this memory too.
    """

    target: str
    why_not: tuple[str, ...]
    weights: int
    cache: int
    tensors: int
    activations: int | None
    build: int
    memory: tuple[int, int] | None
    shared: bool

    @property
    def needs(self) -> int:
        """What running it takes: a lower bound before the build, for activations are not known then."""
        return self.weights + self.cache + self.tensors + (self.activations or 0)

    @property
    def fits(self) -> str:
        """Whether it runs in the memory of ``YES`` all such devices, ``SOME``, ``NO`` none, or ``UNKNOWN``."""
        return _fits(self.needs, self.memory)

    @property
    def builds(self) -> str:
        """Whether the device's memory is enough for a build there; ``UNKNOWN`` where other machines build for it."""
        return _fits(self.build, self.memory) if self.shared else UNKNOWN


def _fits(needs: int, memory: tuple[int, int] | None) -> str:
    if memory is None:
        return UNKNOWN
    least, most = memory
    return YES if needs <= least else SOME if needs <= most else NO


def targets(
    model: Path, names: Sequence[str] = (), profiles: Iterable[Profile] = (), memory: int | None = None
) -> list[Fit]:
    """How ``model`` fits every target, or those called ``names``; an engine fits its own.

    Args:
        model: model directory or engine directory.
        names: of targets; all, if none is given.
        profiles: shapes that the engine must take; an engine's own or ``default_profile`` if there are none.
        memory: bytes that the device has, instead of what the table says.

    Raises:
        UserError: ``model`` is none, a target is unknown, or a profile does not fit the model.
    """
    if not (model / FILE_NAME).is_file():
        model_file(model)
        raise UserError(
            f"{model} is no model directory: it has no {FILE_NAME}",
            hint=f"make one: moe-edge optimize {model} -o DIRECTORY",
        )
    manifest = Manifest.load(model)
    rows = [find_target(name) for name in names] or list(TARGETS)
    if manifest.kind == ENGINE:
        rows = [find_target(str(manifest.details["target"]))]
    return [fit(model, manifest, row, profiles, memory) for row in rows]


def fit(
    model: Path, manifest: Manifest, target: Target, profiles: Iterable[Profile] = (), memory: int | None = None
) -> Fit:
    """How ``model`` fits ``target``; the arguments are those of `targets`.

    Raises:
        UserError: a profile does not fit the model.
    """
    profiles = tuple(profiles) or profiles_of(manifest) or (default_profile(manifest.inputs),)
    for profile in profiles:
        check_profile(profile, manifest.inputs)
    is_engine = manifest.kind == ENGINE
    weights = model_bytes(model)
    caches, others = zip(*(_bytes_at(manifest, profile) for profile in profiles), strict=True)
    logged: Mapping[str, int] = manifest.details.get("memory", {}) if is_engine else {}
    return Fit(
        target=target.name,
        why_not=() if is_engine else tuple(why_not_buildable(model, target)),
        weights=weights,
        cache=max(caches),
        tensors=max(others),
        activations=logged.get("activations"),
        build=0 if is_engine else _BUILD_FACTOR * weights,
        memory=_memory(target) if memory is None else (memory, memory),
        shared=target.shared and target.backend == TENSORRT,  # TensorRT-RTX builds elsewhere
    )


def _memory(target: Target) -> tuple[int, int] | None:
    if target.gigabytes is None:
        return None
    least, most = target.gigabytes
    return least * GIGABYTE, most * GIGABYTE


def _bytes_at(manifest: Manifest, profile: Profile) -> tuple[int, int]:
    """Bytes of the cache, and of the other inputs and outputs, at the largest shapes of ``profile``."""
    largest = {name: shapes.max for name, shapes in profile.items()}
    lengths = {
        dim: length
        for spec in manifest.inputs
        for dim, length in zip(spec.shape, largest.get(spec.name, spec.shape), strict=True)
        if isinstance(dim, str) and isinstance(length, int)
    }
    cache = others = 0
    for spec in (*manifest.inputs, *manifest.outputs):
        size = _bytes(spec, lengths)
        if spec.name.startswith((PAST, PRESENT)):
            cache += size
        else:
            others += size
    return cache, others


def _bytes(spec: TensorSpec, lengths: Mapping[str, int]) -> int:
    """Of one tensor. An axis that no input has is as long as the longest."""
    longest = max(lengths.values(), default=1)
    shape = [dim if isinstance(dim, int) else lengths.get(dim, longest) for dim in spec.shape]
    return math.ceil(math.prod(shape) * _BITS.get(spec.dtype, 8) / 8)
