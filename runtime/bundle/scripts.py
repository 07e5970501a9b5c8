"""What runs on the device: the programs of ``device/``, the files of moe-edge that they use, and a README."""

import importlib.metadata
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from moe_spec.manifest import Manifest
from moe_spec.record import Json
from runtime.profiles import dims, options_of, profile_from_json
from runtime.providers import CPU, find_provider
from runtime.targets import ONNXRUNTIME, TENSORRT, Target
from runtime.verification.tolerances import TOLERANCES

DEVICE = Path(__file__).parent / "device"
PACKAGES = Path(__file__).parents[2]
LIBRARY = ("moe_spec/errors.py", "runtime/parity.py", "runtime/tensorrt/driver.py")
"""Files of moe-edge that ``verify.py`` imports: they keep to Python 3.8, and import nothing of moe-edge but these."""

_BUILDERS = {
    "build.sh": "build engines with trtexec, 10.x or 11.x, into `out/`",
    "build.py": "build engines with TensorRT's Python package, which is all that it needs",
}
_OBSERVED = """\
`out/engine.plan` is the engine to run. `out/observed.plan` shows what its routers do: by it `verify.py` tells flips
from faults. Each is compiled by itself, so one may flip where the other does not: an example on which the engine to run
differs is excused where the golden run chose an expert by no more than rounding. Without `out/observed.plan` that is
all that is known of choices, and a fault that shows nowhere but in such examples stays unseen."""
_CONTAINER = (
    """Where the device itself has no TensorRT, NVIDIA's container `l4t-tensorrt` in the tag of its JetPack has."""
)


def write_scripts(directory: Path, target: Target, manifest: Manifest, details: Json) -> None:
    """Write verify.py, lib/, README.md, and what builds for ``target``."""
    for path in LIBRARY:
        copy = directory / "lib" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGES / path, copy)
        for parent in list(copy.relative_to(directory / "lib").parents)[:-1]:
            (directory / "lib" / parent / "__init__.py").touch()  # else an installed moe-edge would be taken
    shutil.copyfile(DEVICE / "verify.py", directory / "verify.py")
    builders = {TENSORRT: ("build.sh", "build.py"), ONNXRUNTIME: ()}.get(target.backend, ("build.py",))
    for builder in builders:
        (directory / builder).write_text(_filled(builder, _commands(manifest, details)), encoding="utf-8", newline="\n")
        shutil.copymode(DEVICE / builder, directory / builder)
    (directory / "README.md").write_text(
        _filled("README.md", _words(target, manifest, details, builders)), encoding="utf-8", newline="\n"
    )


def _filled(template: str, words: Mapping[str, str]) -> str:
    """One pass: a name of an input may look like a word, and stands in quotes that its value knows nothing of."""
    text = (DEVICE / template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda match: words[match[1]], text)


def _commands(manifest: Manifest, details: Json) -> Mapping[str, str]:
    """The parts of build.sh that depend on the model."""
    element = TOLERANCES[details["precision"]].element
    return {
        "OBSERVED": 'build observed.onnx observed.plan "$@"' if _routed(manifest) else "",
        "PROFILES": " ".join(_profiles(details["profiles"])),
        "CASES": "\n".join(f"  compare {' '.join(_case(case, manifest, element))}" for case in details["golden"]),
    }


def _routed(manifest: Manifest) -> bool:
    """Whether there is a router to observe: a layer with one expert left has none."""
    return any(block.gates is not None for block in manifest.blocks)


def _profiles(profiles: list[Json]) -> list[str]:
    """Options of trtexec; quoted, for names of inputs are a stranger's."""
    options = []
    for number, profile in enumerate(map(profile_from_json, profiles)):
        options += [f"--profile={number}"] if len(profiles) > 1 else []
        options += map(shlex.quote, options_of(profile))
    return options


def _case(case: Json, manifest: Manifest, element: float) -> list[str]:
    """Options of trtexec for the inputs of a golden case, and the outputs that it should give."""
    outputs = {spec.name: case["outputs"][spec.name] for spec in manifest.outputs}
    options = {
        "--shapes": {name: dims(entry["shape"]) or "1" for name, entry in case["inputs"].items()},
        "--loadInputs": {name: entry["file"] for name, entry in case["inputs"].items()},
        "--loadRefOutputs": {name: entry["file"] for name, entry in outputs.items()},
    }
    listed = {option: ",".join(f"{name}:{value}" for name, value in pairs.items()) for option, pairs in options.items()}
    quoted = [shlex.quote(f"{option}={value}") for option, value in listed.items()]
    quoted += [f"--useProfile={case['profile']}"] if case["profile"] else []
    return [*quoted, f"--accuracyThreshold={element * case['magnitude']:.3e}"]


def _words(target: Target, manifest: Manifest, details: Json, builders: tuple[str, ...]) -> Mapping[str, str]:
    tolerance = TOLERANCES[details["precision"]]
    layers = [
        f"| {block.name} | {block.experts} | {block.top_k} | {block.form} | {block.bytes / 1e6:.2f} |"
        for block in manifest.blocks
    ]
    return {
        "TARGET": target.name,
        "VERSION": importlib.metadata.version("moe-edge"),
        "CASES": str(len(details["golden"])),
        "PRECISION": f"{details['precision']}, {tolerance.element:g} of an output's range",
        "BUILDERS": "".join(f"| `{builder}` | {_BUILDERS[builder]} |\n" for builder in builders),
        "HEADING": "Build and check" if builders else "Run it",
        "BUILD": _how(target, manifest, details, builders),
        "LAYERS": "\n".join(layers),
    }


def _how(target: Target, manifest: Manifest, details: Json, builders: tuple[str, ...]) -> str:
    if not builders:
        provider = find_provider(target.provider)
        there = (
            f" On {provider.name}:\n\n```\npython3 verify.py --backend onnxruntime --provider {provider.official}\n```"
        )
        return "Nothing has to be built: ONNX Runtime opens `model/model.onnx`." + (
            there if provider.name != CPU else ""
        )
    package = details["package"]
    where = "On the device" if target.backend == TENSORRT else "Here or there, no GPU is needed for it"
    first = "./build.sh" if "build.sh" in builders else "python3 build.py"
    also = ", or `python3 build.py` without trtexec" if "build.sh" in builders else ""
    paragraphs = [
        f"{where}, with {package} {details['versions']}{also}:",
        f"```\n{first}\npython3 verify.py --backend {package}\n```",
    ]
    if _routed(manifest):
        paragraphs.append(_OBSERVED)
    return "\n\n".join([*paragraphs, _CONTAINER] if target.name.startswith("jetson") else paragraphs)
