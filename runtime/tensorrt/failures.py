"""TensorRT's errors as people need them: which node, why, and what would work instead."""

import re
from collections.abc import Callable
from typing import Any

from moe_spec.errors import UserError
from runtime.targets import TARGETS, find_target
from runtime.tensorrt.request import BuildRequest

_NO_DRIVER = "cudaError 35"  # said whenever something else fails on a machine without a GPU
_UNKNOWN = re.compile(r"Plugin not found|creator version \d+ was not found|^false$")
"""What the parser says of an operator that it cannot import."""
_NOISE = re.compile(r"^\S+: Error Code \d+: |^\S+\.cpp:\d+: |Assertion failed: | ?In \w+ at \S+\.cpp:\d+")

_OF_EXPERTS = frozenset({
    "NonZero", "Compress", "Unique", "ScatterND", "ScatterElements", "Loop", "SequenceAt", "MoE", "QMoE", "TRT_MoE",
    "Experts",
})  # fmt: skip
"""Operators that experts are written with in forms that TensorRT does not take."""

_FORMATS = {"fp8": "float8e4m3fn", "fp4": "float4e2m1"}
"""How TensorRT's formats that not every GPU has begin, and their names in ``targets``."""


def parse_error(parser: Any, request: BuildRequest, logged: list[str]) -> UserError:
    """Why the parser refused a model: each node, its operator, the reason; and the form that the target takes."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    at_nodes = [error for error in errors if error.node_operator()]
    if not at_nodes:
        reason = tidy(logged or [error.desc() for error in errors])
        return UserError(
            f"{request.backend} cannot read {request.onnx.name}: {reason}", hint="export or optimize the model again"
        )
    listing = "; ".join(
        f"node {error.node_name() or error.node()!r} ({error.node_operator()}): "
        + ("it knows no such operator" if _UNKNOWN.search(reason) else reason)
        for error, reason in ((error, tidy([error.desc()])) for error in at_nodes)
    )
    return UserError(
        f"{request.backend} cannot take {request.onnx.name}: {listing}",
        hint=_what_would_work({error.node_operator() for error in at_nodes}, request),
    )


def _what_would_work(operators: set[str], request: BuildRequest) -> str:
    forms = ", ".join(find_target(request.target, request.backend).forms)
    rewrite = f"moe-edge optimize MODEL -o OUT --target {request.target}"
    if operators & _OF_EXPERTS:
        return f"write the experts in a form that {request.target} takes ({forms}): {rewrite}"
    return f"{rewrite} rewrites experts ({forms}); what is no part of them must be exported otherwise"


def build_error(request: BuildRequest, logged: list[str]) -> UserError:
    """Why the builder refused a model that the parser took."""
    text = "\n".join(logged)
    for pattern, explain in _KNOWN.items():
        if found := pattern.search(text):
            return explain(request, found)
    return UserError(
        f"{request.backend} cannot build {request.onnx.name} for compute capability "
        f"{', '.join(request.compute_capabilities)}: {tidy(logged)}",
        hint="run `moe-edge optimize` with this --target, or choose another target",
    )


def _no_such_format(request: BuildRequest, found: re.Match[str]) -> UserError:
    name = next((name for start, name in _FORMATS.items() if found["format"].startswith(start)), "")
    able = [row.name for row in TARGETS if name in row.precisions and row.backend == request.backend]
    return UserError(
        f"{request.onnx.name} holds {found['format']}, which {found['gpus'].strip()} cannot compute with",
        hint=f"build for {', '.join(able)}; or export without it" if able else "export without it",
    )


def _workspace_too_small(request: BuildRequest, _found: re.Match[str]) -> UserError:
    limit = "all there is" if request.workspace_bytes is None else f"{request.workspace_bytes >> 20} MiB"
    return UserError(
        f"{request.backend} finds no kernel for a layer of {request.onnx.name} within the workspace of {limit}",
        hint="give more with --workspace, or leave it out; or make --maxShapes smaller",
    )


def _out_of_memory(request: BuildRequest, _found: re.Match[str]) -> UserError:
    return UserError(
        f"{request.backend} ran out of memory while it built {request.onnx.name}",
        hint="a build takes about three times the weights: free memory or add swap, lower --optimization-level, make "
        "--maxShapes smaller; `moe-edge targets MODEL` counts it",
    )


_KNOWN: dict[re.Pattern[str], Callable[[BuildRequest, "re.Match[str]"], UserError]] = {
    re.compile(r"for target\(s\) (?P<gpus>.*), because .*HW-specific datatypes: (?P<format>\w+)"): _no_such_format,
    re.compile(r"within (the )?workspace limit|[Ii]nsufficient workspace"): _workspace_too_small,
    re.compile(r"[Oo]ut of memory|OutOfMemory|CUDA_ERROR_OUT_OF_MEMORY"): _out_of_memory,
}
"""Failures whose cause is known, the first that matches anything logged."""


def tidy(messages: list[str]) -> str:
    """What TensorRT said first, without its source locations.

    >>> tidy(["IBuilder::build: Error Code 1: Myelin (No GEMM. In compileGraph at /_src/codeGenerator.cpp:2012)"])
    'Myelin (No GEMM.)'
    """
    found = next((message for message in messages if _NO_DRIVER not in message), "it gave no reason")
    return " ".join(_NOISE.sub("", found).split())
