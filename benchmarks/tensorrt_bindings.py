"""Which names TensorRT's Python bindings have, version by version: TensorRT itself cannot be installed without a GPU.

    python -m benchmarks.tensorrt_bindings > tests/runtime/tensorrt/bindings.json

The bindings are wheels of 1.2 MB that PyPI has, the library of several GB is not there. So each version is downloaded,
unpacked into a temporary directory, and imported in a process of its own against a library of nine functions that do
nothing, which a C compiler makes: enough to look at classes, not to make any object.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import ZipFile

VERSIONS = ("10.3.0", "10.16.1.11", "11.0.0.114", "11.4.0.106")
"""The oldest that moe-edge takes (JetPack 6 has it), the last 10.x, the first and the last 11.x."""

_FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")

_LOOK = """
import inspect, json, re

import tensorrt_bindings as trt

def look(path, kind):
    names = {name for name in dir(kind) if not name.startswith("_")}
    # what Python may override without the class having it stands in its documentation only
    names |= set(re.findall(r"^ +def ([a-z]\\w+)\\(self", inspect.getdoc(kind) or "", re.MULTILINE))
    yield path, sorted(names)
    for name in names:
        if inspect.isclass(inner := getattr(kind, name, None)) and inner is not kind:
            yield from look(f"{path}.{name}", inner)

kinds = [(name, kind) for name, kind in vars(trt).items() if inspect.isclass(kind) and not name.startswith("_")]
found = {"": sorted(name for name in dir(trt) if name == "__version__" or not name.startswith("_"))}
print(json.dumps(found | dict(row for name, kind in kinds for row in look(name, kind))))
"""


def names_of(version: str, folder: Path) -> dict[str, list[str]]:
    """Public names of every class of the bindings in ``version``, and of the module itself under ``""``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", folder, f"tensorrt-cu12-bindings=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    source = folder / "nothing.c"
    source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in _FUNCTIONS))
    for library in _LIBRARIES:
        built = folder / f"lib{library}.so.{version.partition('.')[0]}"
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", source, "-o", built], check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    looked = subprocess.run([sys.executable, "-c", _LOOK], env=environment, check=True, capture_output=True, text=True)
    found: dict[str, list[str]] = json.loads(looked.stdout)
    return found


def merge(by_version: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, dict[str, str]]:
    """For each class its names, those of one set of versions together.

    >>> merge({"10": {"Builder": ["a", "b"]}, "11": {"Builder": ["b"]}})
    {'Builder': {'10': 'a', '10 11': 'b'}}
    """
    versions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for version, kinds in by_version.items():
        for kind, names in kinds.items():
            for name in names:
                versions[kind, name].append(version)
    merged: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (kind, name), having in sorted(versions.items()):
        merged[kind][" ".join(having)].append(name)
    return {kind: {having: " ".join(listed) for having, listed in rows.items()} for kind, rows in merged.items()}


def main() -> None:
    """Print the table of all ``VERSIONS``."""
    by_version = {}
    for version in VERSIONS:
        with tempfile.TemporaryDirectory(prefix="moe-edge-bindings-") as folder:
            by_version[version] = names_of(version, Path(folder))
    print(json.dumps(merge(by_version), indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
