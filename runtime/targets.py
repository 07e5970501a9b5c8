"""The devices that moe-edge builds for: one table."""

import dataclasses
from collections.abc import Mapping

from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import Kernels

ONNXRUNTIME, TENSORRT, TENSORRT_RTX = "onnxruntime", "tensorrt", "tensorrt-rtx"

_ALL_FORMS = ("sorted", "dense", "gather", "ffn", "experts", "moe", "qmoe")
_STATIC_FORMS = ("dense", "gather", "ffn")  # TensorRT takes no data-dependent shapes on every kernel

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_FP8 = frozenset({"float8e4m3fn", "float8e5m2"})
_FP4 = frozenset({"float4e2m1"})
_ORT_CPU = frozenset({"float64", "float32", "float16"})


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, or a family of them.

    Attributes:
        name: as given to ``--target``.
        aliases: other names; one may stand in several rows, of which the first wins.
        backend: what builds for it.
        compute_capability: of its GPU, ``major.minor``; None for a CPU.
        forms: forms of the experts that it accepts, the best first.
        precisions: floating formats (ONNX names) that its kernels take.
        note: what a user should know.
    """

    name: str
    aliases: tuple[str, ...]
    backend: str
    compute_capability: str | None
    forms: tuple[str, ...]
    precisions: frozenset[str]
    note: str


TARGETS: tuple[Target, ...] = (
    Target("onnxruntime-cpu", ("cpu",), ONNXRUNTIME, None, _ALL_FORMS, _ORT_CPU, "any CPU"),
    Target("rtx-ampere", ("sm86",), TENSORRT_RTX, "8.6", _STATIC_FORMS, _FLOATS, "RTX 30, RTX A; built without a GPU"),
    Target("rtx-ada", ("sm89",), TENSORRT_RTX, "8.9", _STATIC_FORMS, _FLOATS | _FP8, "RTX 40; built without a GPU"),
    Target(
        "rtx-blackwell", ("sm120",), TENSORRT_RTX, "12.0", _STATIC_FORMS, _FLOATS | _FP8 | _FP4,
        "RTX 50; built without a GPU",
    ),
    Target("sm80", (), TENSORRT_RTX, "8.0", _STATIC_FORMS, _FLOATS, "A100 with TensorRT-RTX; built without a GPU"),
    Target("a100", ("sm80",), TENSORRT, "8.0", _STATIC_FORMS, _FLOATS, "built on the device"),
    Target("h100", ("sm90", "h200"), TENSORRT, "9.0", _STATIC_FORMS, _FLOATS | _FP8, "built on the device"),
    Target("jetson-orin", ("sm87",), TENSORRT, "8.7", _STATIC_FORMS, _FLOATS, "built on the device"),
    Target(
        "jetson-thor", ("sm110",), TENSORRT, "11.0", (*_STATIC_FORMS, "trt_moe"), _FLOATS | _FP8 | _FP4,
        "built on the device",
    ),
)  # fmt: skip

CHECKPOINT_TARGETS: tuple[Kernels, ...] = (
    Kernels("edge-llm-fp16", (128, 256), max_top_k=8),  # Fp16MoePlugin
    Kernels("edge-llm-nvfp4", (128, 256), max_top_k=8),  # Nvfp4MoePlugin; issue 160 there has its whole refusal
    Kernels("edge-llm-nvfp4-a16", (128, 256, 512), max_top_k=32),  # Nvfp4A16MoePlugin
)
"""What builds from a pruned checkpoint by itself, with kernels for certain numbers of experts: plans are made for it.

TensorRT-Edge-LLM 0.11, read in its plugins' sources (https://github.com/NVIDIA/TensorRT-Edge-LLM). Every form of
`TARGETS` takes any number.
"""


def kernels_of(name: str) -> Kernels:
    """What the kernels of the target called ``name`` take.

    >>> kernels_of("edge-llm-fp16").counts, kernels_of("rtx-ada").counts
    ((128, 256), ())

    Raises:
        UserError: there is no such target; the hint names the closest.
    """
    found = next((row for row in CHECKPOINT_TARGETS if row.target == name), None)
    if found is not None:
        return found
    known = {alias for row in TARGETS for alias in (row.name, *row.aliases)}
    if name not in known:
        raise UserError(
            f"unknown target {name!r}", hint=did_you_mean(name, known | {row.target for row in CHECKPOINT_TARGETS})
        )
    return Kernels(name)


def find_target(name: str, backend: str | None = None) -> Target:
    """The target called ``name``, among those of ``backend`` where one is given.

    >>> find_target("sm89").name, find_target("sm80", TENSORRT).name
    ('rtx-ada', 'a100')

    Raises:
        UserError: there is no such target; the hint names the closest.
    """
    if backend is not None and backend not in backends():
        raise UserError(f"unknown backend {backend!r}", hint=did_you_mean(backend, backends()))
    rows = [row for row in TARGETS if backend in (None, row.backend)]
    found = next((row for row in rows if name in (row.name, *row.aliases)), None)
    if found is not None:
        return found
    if any(kernels.target == name for kernels in CHECKPOINT_TARGETS):
        raise UserError(
            f"target {name} builds from a checkpoint by itself",
            hint=f"moe-edge plan --target {name}, and moe-edge prune what it is to build from",
        )
    names = [known for row in rows for known in (row.name, *row.aliases)]
    of = "" if backend is None else f" of {backend}"
    raise UserError(f"unknown target {name!r}{of}", hint=did_you_mean(name, set(names)))


def backends() -> Mapping[str, tuple[str, ...]]:
    """Names of the targets of each backend."""
    names = dict.fromkeys(row.backend for row in TARGETS)
    return {name: tuple(row.name for row in TARGETS if row.backend == name) for name in names}
