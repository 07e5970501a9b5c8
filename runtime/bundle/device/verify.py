"""Check on this device that the model computes what it computed where this bundle was made.

    python3 verify.py --backend onnxruntime
    python3 verify.py --backend tensorrt           after build.sh or build.py; or tensorrt_rtx

TensorRT computes two engines: out/observed.plan shows what routers do, and out/engine.plan is the one to run.

Needs Python 3.8 or newer, numpy and the backend. It ends with 0 if all holds, with 3 if the model computes something
else, and with 1 if a byte of the bundle was changed or the model cannot run here. out/report.json has what was found.
"""

from __future__ import annotations

import argparse
import contextlib
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
from runtime.parity import Routing, ScoreMatch, compare_routing, say_moved, selection_margin

OUT, SUMS, ENGINE, OBSERVED = "out", "SHA256SUMS", "engine.plan", "observed.plan"
ONNX_RUNTIME = "onnxruntime"
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

    def close(self) -> None:
        """Free what it holds."""
        del self._session


class TensorRT:
    """An engine. It shows what its routers do if it was built from observed.onnx."""

    def __init__(self, path: Path, backend: str) -> None:
        from runtime.tensorrt.driver import Driver

        trt = importlib.import_module(backend)
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
            "backend": f"{backend} {trt.__version__}",
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

    def close(self) -> None:
        """Free the GPU, which may not hold two engines."""
        del self._context, self._engine, self._runtime  # before the context that they live in
        self._driver.__exit__(None, None, None)


BACKENDS = (ONNX_RUNTIME, "tensorrt", "tensorrt_rtx")


class Layer:
    """What became of the choices of one router."""

    def __init__(self, block: dict[str, Any], allowed: dict[str, float]) -> None:
        self.block, self.allowed = block, allowed
        self.tokens = self.flips = self.judged = self.judged_flips = self.faults = 0
        self.margin = 0.0
        self.match = ScoreMatch()

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
        self.match.add(mine, theirs)
        by_example = tokens.flipped.reshape(len(clean_B), -1).any(axis=1) if whole else tokens.flipped.any()
        return clean_B & ~by_example

    def reasons(self) -> list[str]:
        """What is wrong with it."""
        name, found = self.block["name"], []
        if self.faults:
            found.append(f"layer {name}: {self.faults} tokens select other experts although the choice was clear")
        elif self.match.moved():
            found.append(f"layer {name}: its router {say_moved(self.match.moved())}")
        if self.judged_flips > self.allowed["flips"] * max(self.judged, 1):
            found.append(f"layer {name}: {self.judged_flips} of {self.judged} tokens select other experts")
        return found

    def report(self) -> dict[str, Any]:
        """As it stands in report.json."""
        counts = ("tokens", "flips", "judged", "judged_flips", "faults")
        seen = {name: getattr(self, name) for name in counts}
        return {"name": self.block["name"], **seen, "largest_margin": self.margin if np.isfinite(self.margin) else None}


class Output:
    """How far one output is off, on examples without flips.

    Where an engine does not show its routers, an example that differs is excused if a choice in it was a near tie.
    """

    def __init__(self, name: str, allowed: dict[str, float]) -> None:
        self.name, self.allowed = name, allowed["element"]
        self.differences: list[float] = []  # of each example
        self.tied: list[bool] = []
        self.magnitude = 0.0

    def add(self, expected: Any, got: Any, clean_B: Any, tied_B: Any) -> None:
        """Take in a batch: its examples without flips, and those where an unseen flip is to be expected."""
        if expected.shape != got.shape:
            raise UserError(f"output {self.name} is {list(got.shape)}, expected {list(expected.shape)}", hint="")
        whole = expected.ndim > 0 and len(expected) % len(clean_B) == 0  # else rows belong to no example
        clean, tied = (clean_B, tied_B) if whole else (np.array([clean_B.all()]), np.array([tied_B.any()]))
        mine, theirs = (x.astype(np.float64).reshape(len(clean), -1)[clean] for x in (expected, got))
        difference = np.nan_to_num(np.where(mine == theirs, 0.0, np.abs(mine - theirs)), nan=np.inf)
        self.differences += difference.max(axis=1, initial=0.0).tolist()
        self.tied += tied[clean].tolist()
        self.magnitude = max(self.magnitude, float(np.abs(mine[np.isfinite(mine)]).max(initial=0.0)))

    def errors(self) -> tuple[list[float], int]:
        """Largest difference over largest magnitude of each example that counts; how many are excused."""
        errors = [difference / max(self.magnitude, 1e-30) for difference in self.differences]
        counted = [error for error, tied in zip(errors, self.tied) if error <= self.allowed or not tied]
        return counted, len(errors) - len(counted)

    def reasons(self) -> list[str]:
        """What is wrong with it."""
        errors, excused = self.errors()
        if not errors:
            every = "differs, and may have flipped" if excused else "flipped"
            return [f"output {self.name}: every example {every}, no element could be compared"]
        if max(errors) > self.allowed:
            return [f"output {self.name}: differs by {max(errors):.1e} of its range, allowed {self.allowed:.1e}"]
        return []

    def report(self) -> dict[str, Any]:
        """As it stands in report.json."""
        errors, excused = self.errors()
        largest = max(errors) if errors and np.isfinite(max(errors)) else None
        return {"name": self.name, "examples": len(errors), "excused": excused, "max_rel": largest}


def near_ties(blocks: list[dict[str, Any]], values: dict[str, Any], examples: int, margin: float) -> Any:
    """Examples (B,) of a golden run in which a router of ``blocks`` chose by no more than rounding."""
    tied_B = np.zeros(examples, dtype=bool)
    for block in blocks:
        tied = selection_margin(values[block["scores"]].astype(np.float64), block["top_k"]) <= margin
        whole = len(tied) % examples == 0  # else tokens belong to no example
        tied_B |= tied.reshape(examples, -1).any(axis=1) if whole else tied.any()
    return tied_B


def compare(session: Any, directory: Path, manifest: dict[str, Any], allowed: dict[str, float]) -> dict[str, Any]:
    """Run every golden case; layers, outputs and reasons against them; layers whose choices are not to be seen."""
    layers = [Layer(block, allowed) for block in manifest["blocks"]]
    outputs = [Output(spec["name"], allowed) for spec in manifest["outputs"]]
    hidden: list[dict[str, Any]] = []
    for case in manifest["details"]["golden"]:
        with np.load(str(directory / case["npz"]), allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        got = session.run({name: values[name] for name in case["inputs"]}, case["profile"])
        clean_B = np.ones(case["examples"], dtype=bool)
        for layer in layers:
            clean_B = layer.add(values, got, clean_B)
        hidden = [block for block in manifest["blocks"] if block["gates"] is not None and block["gates"] not in got]
        tied_B = near_ties(hidden, values, case["examples"], allowed["margin"])
        for output in outputs:
            output.add(values[output.name], got[output.name], clean_B, tied_B)
    reasons = [reason for layer in layers for reason in layer.reasons()]
    return {
        "reasons": reasons + [reason for output in outputs for reason in output.reasons()],
        "layers": [layer.report() for layer in layers if layer.tokens],
        "outputs": [output.report() for output in outputs],
        "hidden": [block["name"] for block in hidden],
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


def judge(session: Any, directory: Path, manifest: dict[str, Any], allowed: dict[str, float]) -> dict[str, Any]:
    """What was found of one session, with its latency and versions."""
    with contextlib.closing(session):
        found = compare(session, directory, manifest, allowed)
        case = manifest["details"]["golden"][0]
        times = latency(session, directory, case)
    return {**found, **session.about, "latency_ms": times, "examples": case["examples"]}


def judge_engines(directory: Path, options: Any, manifest: dict[str, Any], allowed: dict[str, float]) -> dict[str, Any]:
    """What was found of the engine to run, and of its routers by the one that shows them.

    These are two compilations of one model, of which one may flip where the other does not. So each is compared with
    the golden run by itself.
    """
    plan, shows = options.engine or directory / OUT / ENGINE, directory / OUT / OBSERVED
    found = judge(TensorRT(plan, options.backend), directory, manifest, allowed)
    if options.engine is not None or not shows.is_file():
        return found
    watched = judge(TensorRT(shows, options.backend), directory, manifest, allowed)
    return {
        **found,
        "reasons": [f"{OUT}/{OBSERVED}: {reason}" for reason in watched["reasons"]] + found["reasons"],
        "layers": watched["layers"],
        "hidden": watched["hidden"],
        "observed": {name: watched[name] for name in ("outputs", "engine_sha256")},
    }


def verify(directory: Path, options: Any) -> int:
    """The whole check; the exit code."""
    check_files(directory)
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    allowed = json.loads((directory / "thresholds.json").read_text(encoding="utf-8"))
    if options.backend == ONNX_RUNTIME:
        found = judge(OnnxRuntime(directory, options), directory, manifest, allowed)
    else:
        found = judge_engines(directory, options, manifest, allowed)
    report = {
        "passed": not found["reasons"],
        **found,
        "allowed": allowed,
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
    if report["hidden"]:
        print("what routers do is not shown: an example that differs is excused where a choice was a near tie")
        print(f"{OUT}/{OBSERVED} shows it, which ./build.sh and python3 build.py make")
    outputs = [(output["name"], output) for output in report["outputs"]]
    watched = report.get("observed", {"outputs": []})["outputs"]
    outputs += [(f"{output['name']} of {OUT}/{OBSERVED}", output) for output in watched]
    for name, output in outputs:
        error = "-" if output["max_rel"] is None else f"{output['max_rel']:.1e}"
        excused = f", {output['excused']} more are excused" if output["excused"] else ""
        print(f"output {name}: differs by {error} of its range on {output['examples']} examples{excused}")
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in report["latency_ms"].items())
    print(f"{report['backend']}: {times} for {report['examples']} examples")
    print("\n".join(report["reasons"] + ["PASS" if report["passed"] else "FAIL"]))


def main(arguments: list[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
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
