"""Check on this device that the model computes what it computed where this bundle was made.

    python3 verify.py --backend onnxruntime
    python3 verify.py --backend tensorrt           after build.sh or build.py; or tensorrt_rtx

Needs Python 3.8 or newer, numpy and the backend. It ends with 0 if all holds, with 3 if the model computes something
else, and with 1 if a byte of the bundle was changed or the model cannot run here. out/report.json has what was found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "lib"))
sys.dont_write_bytecode = True  # a bundle stays as it is

import numpy as np

from moe_spec.errors import UserError
from runtime.parity import Routing, compare_routing

OUT, SUMS, ENGINE = "out", "SHA256SUMS", "engine.plan"
AGAIN = "build it again from this bundle: ./build.sh or python3 build.py"
WARM_UP, TIMED = 3, 30
PASSED, BROKEN, DIFFERS = 0, 1, 3


def check_files(directory: Path) -> None:
    """Compare every file but those below out/ with SHA256SUMS, and that with what it should look like.

    Raises:
        UserError: a file is missing, changed, or not listed.
    """
    again = "copy the bundle again, or make it again with `moe-edge bundle`"
    sums = directory / SUMS
    if not sums.is_file():
        raise UserError(f"{sums} is missing", hint=again)
    text = sums.read_bytes().decode("utf-8", "replace")
    listed = {line[66:]: line for line in text.split("\n")}
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    found = [name for name in names if name != SUMS and not name.startswith(OUT + "/")]
    for name in found:
        if name not in listed:
            raise UserError(f"{directory / name} does not belong to the bundle", hint=f"remove it, or {again}")
        if listed[name] != f"{sha256_of(directory / name)}  {name}":
            raise UserError(f"{directory / name} was changed: its sha256 is another than in {SUMS}", hint=again)
    missing = sorted(set(listed) - set(found) - {""})
    if missing:
        raise UserError(f"{directory / missing[0]} is missing, {SUMS} lists it", hint=again)
    if text != "".join(f"{listed[name]}\n" for name in found):
        raise UserError(f"{sums} was changed", hint=again)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


class OnnxRuntime:
    """The model on ONNX Runtime, with what its routers do."""

    def __init__(self, directory: Path, options: Any) -> None:
        ort = importlib.import_module("onnxruntime")
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        # what multiplies quantised weights stays float, as in the golden run: by default it becomes int8
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        providers = options.provider or ["CPUExecutionProvider"]
        graph = directory / "model" / "observed.cpu.onnx"
        if not graph.is_file():
            graph = graph.with_name("observed.onnx")
        # float32 means float32: by default CUDA computes its products in TF32
        asked = [(name, {"use_tf32": "0"}) if name == "CUDAExecutionProvider" else name for name in providers]
        self._session = ort.InferenceSession(str(graph), settings, providers=asked)
        used = self._session.get_providers()
        if providers[0] not in used:
            raise UserError(f"{providers[0]} was asked for, ONNX Runtime chose {used[0]}", hint="install its package")
        self.about = {"backend": f"onnxruntime {ort.__version__}", "providers": used}

    def run(self, feeds: dict[str, Any], _profile: int) -> dict[str, Any]:
        """Outputs by name; the graph takes any shape."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, feeds)))


class TensorRT:
    """The engine below out/. It shows what its routers do if it was built from observed.onnx."""

    def __init__(self, directory: Path, options: Any) -> None:
        from runtime.tensorrt.driver import Driver

        trt = importlib.import_module(options.backend)
        path = options.engine or directory / OUT / ENGINE
        if not path.is_file():
            raise UserError(f"{path} does not exist", hint="build it first: ./build.sh or python3 build.py")
        self._driver = Driver()
        self._driver.__enter__()
        self._numpy_type, self._runtime = trt.nptype, trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise UserError(f"{path} cannot be deserialised on this GPU", hint="build it again on this device")
        self._context, self._profile = self._engine.create_execution_context(), 0
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._outputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self.about = {
            "backend": f"{options.backend} {trt.__version__}",
            "engine_sha256": sha256_of(path),
            "compute_capability": self._driver.compute_capability(),
        }

    def run(self, feeds: dict[str, Any], profile: int) -> dict[str, Any]:
        """Outputs by name, of feeds whose shapes that profile takes."""
        stream = self._driver.stream.value
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, stream):
                raise UserError(f"the engine has no profile {profile}", hint=AGAIN)
            self._driver.synchronize()
            self._profile = profile
        for name, array in feeds.items():
            if not self._context.set_input_shape(name, array.shape):
                dims = "x".join(map(str, array.shape))
                raise UserError(f"profile {profile} of the engine takes no {name} of {dims}", hint=AGAIN)
            address = self._driver.buffer(name, array.nbytes)
            self._driver.upload(address, np.ascontiguousarray(array))
            self._context.set_tensor_address(name, address)
        places = {}
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            dtype = np.dtype(self._numpy_type(self._engine.get_tensor_dtype(name)))
            address = self._driver.buffer(name, int(np.prod(shape)) * dtype.itemsize)
            self._context.set_tensor_address(name, address)
            places[name] = (address, shape, dtype)
        if not self._context.execute_async_v3(stream):
            raise UserError("the engine failed on the GPU", hint="see TensorRT's messages above")
        results = {name: self._driver.download(*place) for name, place in places.items()}
        self._driver.synchronize()
        return results


BACKENDS = {"onnxruntime": OnnxRuntime, "tensorrt": TensorRT, "tensorrt_rtx": TensorRT}


class Layer:
    """What became of the choices of one router."""

    def __init__(self, block: dict[str, Any], allowed: dict[str, float]) -> None:
        self.block, self.allowed = block, allowed
        self.tokens = self.flips = self.judged = self.judged_flips = self.faults = 0
        self.margin = 0.0

    def add(self, expected: dict[str, Any], got: dict[str, Any], clean_B: Any) -> Any:
        """Compare a batch; the examples that are without a flip still."""
        gates, scores = self.block["gates"], self.block["scores"]
        if gates is None or gates not in got:
            return clean_B
        experts = list(range(self.block["experts"]))
        mine, theirs = (Routing.of(run[gates], run[scores], experts, len(experts)) for run in (expected, got))
        tokens = compare_routing(mine, theirs, self.block["top_k"])
        count = len(tokens.flipped)
        whole = count % len(clean_B) == 0  # else tokens belong to no example: one flip may change anything
        judged = np.repeat(clean_B, count // len(clean_B)) if whole else np.full(count, clean_B.all())
        flips = tokens.flipped & judged
        faults = flips & (tokens.margin > self.allowed["margin"]) & (tokens.weight > self.allowed["element"])
        self.tokens += count
        self.flips += int(tokens.flipped.sum())
        self.judged += int(judged.sum())
        self.judged_flips += int(flips.sum())
        self.faults += int(faults.sum())
        self.margin = max(self.margin, float(tokens.margin[flips].max(initial=0.0)))
        by_example = tokens.flipped.reshape(len(clean_B), -1).any(axis=1) if whole else tokens.flipped.any()
        return clean_B & ~by_example

    def reasons(self) -> list[str]:
        """What is wrong with it."""
        name, found = self.block["name"], []
        if self.faults:
            found.append(f"layer {name}: {self.faults} tokens select other experts although the choice was clear")
        if self.judged_flips > self.allowed["flips"] * max(self.judged, 1):
            found.append(f"layer {name}: {self.judged_flips} of {self.judged} tokens select other experts")
        return found

    def report(self) -> dict[str, Any]:
        """As it stands in report.json."""
        counts = ("tokens", "flips", "judged", "judged_flips", "faults")
        seen = {name: getattr(self, name) for name in counts}
        return {"name": self.block["name"], **seen, "largest_margin": self.margin if np.isfinite(self.margin) else None}


class Output:
    """How far one output is off, on examples without flips."""

    def __init__(self, name: str, allowed: dict[str, float]) -> None:
        self.name, self.allowed = name, allowed["element"]
        self.examples, self.difference, self.magnitude = 0, 0.0, 0.0

    def add(self, expected: Any, got: Any, clean_B: Any) -> None:
        """Take in a batch."""
        if expected.shape != got.shape:
            raise UserError(f"output {self.name} is {list(got.shape)}, expected {list(expected.shape)}", hint="")
        clean = clean_B if len(expected) % len(clean_B) == 0 else np.array([clean_B.all()])
        mine, theirs = (x.astype(np.float64).reshape(len(clean), -1)[clean] for x in (expected, got))
        difference = np.where(mine == theirs, 0.0, np.abs(mine - theirs))
        self.examples += int(clean.sum())
        self.difference = max(self.difference, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
        self.magnitude = max(self.magnitude, float(np.abs(mine[np.isfinite(mine)]).max(initial=0.0)))

    def error(self) -> float:
        """Largest difference over largest magnitude."""
        return self.difference / max(self.magnitude, 1e-30)

    def reasons(self) -> list[str]:
        """What is wrong with it."""
        if not self.examples:
            return [f"output {self.name}: every example flipped, no element could be compared"]
        if self.error() > self.allowed:
            return [f"output {self.name}: differs by {self.error():.1e} of its range, allowed {self.allowed:.1e}"]
        return []

    def report(self) -> dict[str, Any]:
        """As it stands in report.json."""
        known = self.examples > 0 and bool(np.isfinite(self.difference))
        return {"name": self.name, "examples": self.examples, "max_rel": self.error() if known else None}


def compare(session: Any, directory: Path, manifest: dict[str, Any], allowed: dict[str, float]) -> dict[str, Any]:
    """Run every golden case; layers, outputs and reasons against them."""
    layers = [Layer(block, allowed) for block in manifest["blocks"]]
    outputs = [Output(spec["name"], allowed) for spec in manifest["outputs"]]
    for case in manifest["details"]["golden"]:
        with np.load(str(directory / case["npz"]), allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        got = session.run({name: values[name] for name in case["inputs"]}, case["profile"])
        clean_B = np.ones(case["examples"], dtype=bool)
        for layer in layers:
            clean_B = layer.add(values, got, clean_B)
        for output in outputs:
            output.add(values[output.name], got[output.name], clean_B)
    reasons = [reason for layer in layers for reason in layer.reasons()]
    return {
        "reasons": reasons + [reason for output in outputs for reason in output.reasons()],
        "layers": [layer.report() for layer in layers if layer.tokens],
        "outputs": [output.report() for output in outputs],
    }


def latency(session: Any, directory: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a run of the first golden case."""
    with np.load(str(directory / case["npz"]), allow_pickle=False) as arrays:
        feeds = {name: arrays[name] for name in case["inputs"]}
    taken = []
    for index in range(WARM_UP + TIMED):
        started = time.perf_counter()
        session.run(feeds, case["profile"])
        if index >= WARM_UP:
            taken.append((time.perf_counter() - started) * 1e3)
    return {f"p{share}": float(np.percentile(taken, share)) for share in (50, 90, 99)}


def device() -> dict[str, str]:
    """What this machine says of itself."""
    facts = {"system": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
    for name, path in (("board", "/proc/device-tree/model"), ("jetpack", "/etc/nv_tegra_release")):
        if Path(path).is_file():
            facts[name] = Path(path).read_text(errors="replace").strip("\x00\n ")
    return facts


def verify(directory: Path, options: Any) -> int:
    """The whole check; the exit code."""
    check_files(directory)
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    allowed = json.loads((directory / "thresholds.json").read_text(encoding="utf-8"))
    session: Any = BACKENDS[options.backend](directory, options)
    found = compare(session, directory, manifest, allowed)
    golden = manifest["details"]["golden"]
    report = {
        "passed": not found["reasons"],
        **found,
        **session.about,
        "allowed": allowed,
        "latency_ms": latency(session, directory, golden[0]),
        "examples": golden[0]["examples"],
        "device": device(),
        "bundle_sha256": sha256_of(directory / SUMS),
    }
    (directory / OUT).mkdir(exist_ok=True)
    (directory / OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    return PASSED if report["passed"] else DIFFERS


def show(report: dict[str, Any]) -> None:
    """The report in a few lines."""
    for layer in report["layers"]:
        print(f"layer {layer['name']}: {layer['flips']} of {layer['tokens']} tokens select other experts")
    if not report["layers"]:
        print("what routers do is not shown: all examples are compared")
    for output in report["outputs"]:
        error = "-" if output["max_rel"] is None else f"{output['max_rel']:.1e}"
        print(f"output {output['name']}: differs by {error} of its range on {output['examples']} examples")
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in report["latency_ms"].items())
    print(f"{report['backend']}: {times} for {report['examples']} examples")
    print("\n".join(report["reasons"] + ["PASS" if report["passed"] else "FAIL"]))


def main(arguments: list[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=sorted(BACKENDS), required=True)
    parser.add_argument("--provider", action="append", help="of ONNX Runtime; CPUExecutionProvider if not given")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: one a core")
    parser.add_argument("--engine", type=Path, help="another engine than out/engine.plan")
    try:
        return verify(HERE, parser.parse_args(arguments))
    except ImportError as missing:
        print(f"error: {missing}\nhint: install what --backend names", file=sys.stderr)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
    return BROKEN


if __name__ == "__main__":
    sys.exit(main())
