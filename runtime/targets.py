"""The devices that moe-edge builds for: one table, which `moe-edge targets` prints."""

import dataclasses
from collections.abc import Mapping

from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import Kernels
from runtime.providers import CPU, CUDA, OPENVINO

ONNXRUNTIME, TENSORRT, TENSORRT_RTX = "onnxruntime", "tensorrt", "tensorrt-rtx"

_ALL_FORMS = ("sorted", "dense", "gather", "ffn", "experts", "moe", "qmoe")
_STATIC_FORMS = ("dense", "gather", "ffn")  # TensorRT takes no data-dependent shapes on every kernel
_MOE_LAYER = (*_STATIC_FORMS, "trt_moe")  # IMoELayer, on SM100 to SM110

_ORT_CPU = frozenset({"float64", "float32", "float16", "int8", "int4", "uint4", "float8e4m3fn"})
_AMPERE = frozenset({"float64", "float32", "float16", "bfloat16", "int8", "int4"})
_ADA = _AMPERE | {"float8e4m3fn"}
_BLACKWELL = _ADA | {"float4e2m1"}

_RTX, _RTX_121 = ">=1.4", ">=1.5"
_TRT, _TRT_BLACKWELL, _TRT_SPARK = ">=10.3", ">=10.8", ">=10.14.1"  # from TensorRT's release notes
_TRT_ORIN, _TRT_THOR = ">=10.3,<11 or >=11.4.1", ">=10.13,<11 or >=11.4.1"  # JetPack 6 or 7.0, or from 7.2.2
_ORT = ">=1.24"


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, or a family of them.

    Attributes:
        name: as given to ``--target``.
        aliases: other names; one may stand in several rows, of which the first wins.
        backend: what builds for it.
        compute_capability: of its GPU, ``major.minor``; None for a CPU.
        versions: of the backend's library that know it, as `version_fits` reads them.
        forms: forms of the experts that it accepts, the best first. Each takes any number of experts.
        precisions: formats of weights and activations (ONNX names) that its kernels take.
        gigabytes: memory of the smallest and of the largest such device; None where any is sold.
        note: what a user should know.
        shared: whether CPU and GPU share that memory, so that a build on the device takes part of it.
        provider: of ONNX Runtime, for that backend.
    """

    name: str
    aliases: tuple[str, ...]
    backend: str
    compute_capability: str | None
    versions: str
    forms: tuple[str, ...]
    precisions: frozenset[str]
    gigabytes: tuple[int, int] | None
    note: str
    shared: bool = False
    provider: str = CPU


_AHEAD, _ON_DEVICE = "built without a GPU", "built on the device"

TARGETS: tuple[Target, ...] = (
    Target(
        "onnxruntime-cpu", ("cpu", "onnxruntime-x86"), ONNXRUNTIME, None, _ORT, _ALL_FORMS, _ORT_CPU, None,
        "any CPU; tested on x86-64",
    ),
    Target(
        "onnxruntime-arm64", ("arm64",), ONNXRUNTIME, None, _ORT, _ALL_FORMS, _ORT_CPU, None,
        "the same engine; not tested there",
    ),
    Target(
        "onnxruntime-cuda", (), ONNXRUNTIME, None, _ORT, _ALL_FORMS, _AMPERE, None,
        "any NVIDIA GPU; needs onnxruntime-gpu with CUDA and cuDNN; not tested there", provider=CUDA,
    ),
    Target(
        "onnxruntime-openvino", (), ONNXRUNTIME, None, _ORT, _STATIC_FORMS, _ORT_CPU, None,
        "Intel; compiled when opened, see run --provider openvino", provider=OPENVINO,
    ),
    Target(
        "rtx-ampere", ("sm86",), TENSORRT_RTX, "8.6", _RTX, _STATIC_FORMS, _AMPERE, (4, 48), f"RTX 30, RTX A; {_AHEAD}"
    ),
    Target("rtx-ada", ("sm89",), TENSORRT_RTX, "8.9", _RTX, _STATIC_FORMS, _ADA, (6, 48), f"RTX 40; {_AHEAD}"),
    Target(
        "rtx-blackwell", ("sm120",), TENSORRT_RTX, "12.0", _RTX, _STATIC_FORMS, _BLACKWELL, (8, 96),
        f"RTX 50, RTX PRO; {_AHEAD}",
    ),
    Target(
        "dgx-spark", ("sm121",), TENSORRT_RTX, "12.1", _RTX_121, _STATIC_FORMS, _BLACKWELL, (128, 128),
        f"GB10; {_AHEAD}", shared=True,
    ),
    Target(
        "sm80", (), TENSORRT_RTX, "8.0", _RTX, _STATIC_FORMS, _AMPERE, (40, 80), f"A100 with TensorRT-RTX; {_AHEAD}"
    ),
    Target("a100", ("sm80",), TENSORRT, "8.0", _TRT, _STATIC_FORMS, _AMPERE, (40, 80), _ON_DEVICE),
    Target("h100", ("sm90", "h200"), TENSORRT, "9.0", _TRT, _STATIC_FORMS, _ADA, (80, 141), _ON_DEVICE),
    Target("b200", ("sm100",), TENSORRT, "10.0", _TRT_BLACKWELL, _MOE_LAYER, _BLACKWELL, (180, 192), _ON_DEVICE),
    Target(
        "spark-tensorrt", ("sm121",), TENSORRT, "12.1", _TRT_SPARK, _STATIC_FORMS, _BLACKWELL, (128, 128),
        f"dgx-spark with TensorRT; {_ON_DEVICE}", shared=True,
    ),
    Target(
        "jetson-orin", ("sm87",), TENSORRT, "8.7", _TRT_ORIN, _STATIC_FORMS, _AMPERE, (4, 64), _ON_DEVICE, shared=True
    ),
    Target(
        "jetson-thor", ("sm110",), TENSORRT, "11.0", _TRT_THOR, _MOE_LAYER, _BLACKWELL, (64, 128), _ON_DEVICE,
        shared=True,
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A MoE plugin of TensorRT-Edge-LLM.

    Attributes:
        kernels: numbers of experts and K that it takes, and the target's name.
        name: of the plugin.
        capabilities: of the GPUs that it has kernels for; empty where its source does not say.
        note: what else it asks for.
    """

    kernels: Kernels
    name: str
    capabilities: tuple[str, ...]
    note: str


_EVERY = ("8.0", "8.6", "8.7", "8.9", "10.0", "10.1", "10.3", "11.0", "12.0", "12.1")

PLUGINS: tuple[Plugin, ...] = (
    Plugin(
        Kernels("edge-llm-fp16", (128, 256), max_top_k=8), "Fp16MoePlugin", _EVERY,
        "SwiGLU or ReLU2; H a multiple of 128, F of 64",
    ),
    Plugin(
        Kernels("edge-llm-int4"), "Int4MoePlugin", (),
        "SiLU or GeGLU; always renormalises; blocks of 128; the way for Jetson Orin",
    ),
    # issue 160 there has its whole refusal
    Plugin(Kernels("edge-llm-nvfp4", (128, 256), max_top_k=8), "Nvfp4MoePlugin", ("10.0", "10.1", "11.0"), "fp16 in"),
    Plugin(
        Kernels("edge-llm-nvfp4-a16", (128, 256, 512), max_top_k=32), "Nvfp4A16MoePlugin", (),
        "weights of 4 bits, activations of 16",
    ),
    Plugin(Kernels("edge-llm-nvfp4-geforce"), "NvFP4MoEPluginGeforce", ("12.0", "12.1"), "fp16 in"),
)  # fmt: skip
"""What builds from a pruned checkpoint by itself, with kernels for certain numbers of experts: plans are made for it.

TensorRT-Edge-LLM 0.11, read in its plugins' sources (https://github.com/NVIDIA/TensorRT-Edge-LLM). Every form of
`TARGETS` takes any number.
"""

CHECKPOINT_TARGETS: tuple[Kernels, ...] = tuple(plugin.kernels for plugin in PLUGINS)


def version_fits(version: str, versions: str) -> bool:
    """Whether ``version`` is one of ``versions``.

    >>> version_fits("10.3.0.30", ">=10.3,<11 or >=11.4.1"), version_fits("11.4.0.106", ">=10.3,<11 or >=11.4.1")
    (True, False)
    """
    found = _numbers(version)

    def holds(clause: str) -> bool:
        return found >= _numbers(clause[2:]) if clause.startswith(">=") else found < _numbers(clause[1:])

    return any(all(map(holds, span.split(","))) for span in versions.split(" or "))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


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
