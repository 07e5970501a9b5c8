"""Every name of TensorRT that the source touches is in the published bindings of 10.x and 11.x, and in TensorRT-RTX.

The names are read from the source, so none can be left out; ``python -m benchmarks.tensorrt_bindings`` made the table.
"""

import ast
import inspect
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TABLE = json.loads(Path(__file__).with_name("bindings.json").read_text())

RECEIVERS: dict[str, dict[str, str]] = {
    "library": {},
    "network": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "cache": "ITimingCache",
        "tensor": "ITensor",
        "layer": "ILayer",
        "members": "",
    },
    "listeners": {"severity": "ILogger.Severity"},
    "failures": {"parser": "OnnxParser", "error": "ParserError"},
    "session": {
        "self._runtime": "Runtime",
        "self._engine": "ICudaEngine",
        "engine": "ICudaEngine",
        "self._context": "IExecutionContext",
    },
    "runtime_cache": {
        "engine": "ICudaEngine",
        "self._engine": "ICudaEngine",
        "self._config": "IRuntimeConfig",
        "self._cache": "IRuntimeCache",
    },
    "backend": {},
    "../bundle/device/build": {
        "builder": "Builder",
        "parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
    },
    "../bundle/device/verify": {
        "self._runtime": "Runtime",
        "self._engine": "ICudaEngine",
        "self._context": "IExecutionContext",
    },
}
"""What the variables of each module that hold one of TensorRT's objects are. ``trt`` is the library itself."""

NOT_THE_LIBRARY = {"process", "request", "worker", "plan_header", "driver", "__init__"}
"""Modules that have none of its objects in hand."""

OF_ITS_NAME = {"members": {"__name__"}}
"""Attributes that every class has."""

BY_NAME = {
    "HardwareCompatibilityLevel": {"AMPERE_PLUS"},  # the other level is refused by name where it is missing
    "MemoryPoolType": {"WORKSPACE"},
}
"""Asked for by ``getattr``."""

ONLY_RTX = {
    "": {"ComputeCapability", "CudaGraphStrategy"},
    "IBuilderConfig": {"num_compute_capabilities", "set_compute_capability"},
    "CudaGraphStrategy": {"WHOLE_GRAPH_CAPTURE"},
    "IRuntimeConfig": {"cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"},
    "IRuntimeCache": {"serialize", "deserialize"},
}
"""Behind ``hasattr`` of one of the first two, and what only they lead to."""

FROM_10_16 = {
    "ICudaEngine": {"create_runtime_config"},  # behind them too
    "Builder": {"build_serialized_network_to_stream"},
    "IStreamWriter": {"write"},
    "": {"IStreamWriter"},
}
"""Behind ``hasattr``, and not in TensorRT 10.3."""


def touched(module, receivers):
    """Class and name of every attribute of TensorRT's that ``module`` reads, sets or overrides."""
    tree = ast.parse((ROOT / "runtime" / "tensorrt" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = ast.unparse(node.value)
            if base == "trt" or re.fullmatch(r"trt(\.[A-Z]\w+)+", base):
                yield base.removeprefix("trt").removeprefix("."), node.attr
            elif base in receivers and node.attr not in OF_ITS_NAME.get(base, ()):
                yield receivers[base], node.attr
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            overridden = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            for base in bases:
                if base.startswith("trt."):
                    yield from ((base.removeprefix("trt."), name) for name in overridden if not name.startswith("_"))


@pytest.fixture(scope="module")
def surface():
    found: dict[str, set[str]] = defaultdict(set)
    for kind, names in BY_NAME.items():
        found[kind] |= names
    for module, receivers in RECEIVERS.items():
        for kind, name in touched(module, receivers):
            found[kind].add(name)
    return found


def versions_with(kind, name):
    rows = TABLE.get(kind, {})
    return {version for versions, names in rows.items() if name in names.split() for version in versions.split()}


def test_every_module_is_looked_at():
    modules = {path.stem for path in (ROOT / "runtime" / "tensorrt").glob("*.py")}
    assert modules == {name for name in RECEIVERS if not name.startswith("..")} | NOT_THE_LIBRARY


def test_every_variable_that_is_named_is_one(surface):
    for module, receivers in RECEIVERS.items():
        used = {kind for kind, _ in touched(module, receivers)}
        assert {kind for kind in receivers.values() if kind} <= used
    assert len(surface) > 20
    assert sum(map(len, surface.values())) > 60


def test_tensorrt_10_and_11_have_every_name(surface):
    versions = {version for rows in TABLE.values() for key in rows for version in key.split()}
    assert {version.partition(".")[0] for version in versions} == {"10", "11"}
    guarded = {(kind, name) for table in (ONLY_RTX, FROM_10_16) for kind, names in table.items() for name in names}
    missing = {
        (kind, name): versions - versions_with(kind, name)
        for kind, names in surface.items()
        for name in names
        if versions_with(kind, name) != versions
    }
    assert set(missing) == guarded


def test_what_is_said_to_be_of_tensorrt_rtx_only_is():
    assert {(kind, name) for kind, names in ONLY_RTX.items() for name in names if versions_with(kind, name)} == set()
    for kind, names in FROM_10_16.items():
        for name in names:
            assert versions_with(kind, name) == {"10.16.1.11", "11.0.0.114", "11.4.0.106"}


def test_tensorrt_rtx_has_every_name(surface):
    trt = pytest.importorskip("tensorrt_rtx")
    for path, names in surface.items():
        kind: Any = trt
        for part in filter(None, path.split(".")):
            kind = getattr(kind, part)
        documented = set(re.findall(r"^ +def ([a-z]\w+)\(self", inspect.getdoc(kind) or "", re.MULTILINE))
        assert names <= set(dir(kind)) | documented
