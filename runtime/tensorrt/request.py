"""What a build process is told, and what it tells back: JSON files, and lines of progress."""

import dataclasses
import json
from pathlib import Path

from runtime.profiles import Profile, profile_from_json

FACTS, ERROR = "facts.json", "error.json"


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    Attributes:
        backend: as in ``targets``.
        target: name of the target.
        onnx: the graph; its weights lie beside it.
        engine: the file to write.
        compute_capabilities: of the target, and of the others that the engine must run on.
        profiles: ranges of the dynamic inputs; empty where all shapes are fixed.
        workspace_bytes: as in ``BuildOptions``, like all that follow.
        optimization_level: likewise.
        weight_streaming: likewise.
        timing_cache: likewise.
        version_compatible: likewise.
        hardware_compatibility: likewise.
    """

    backend: str
    target: str
    onnx: Path
    engine: Path
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: str | None = None

    def save(self, path: Path) -> None:
        """Write the request."""
        path.write_text(json.dumps(dataclasses.asdict(self), default=str), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "BuildRequest":
        """Read a request that ``save`` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        profiles = tuple(map(profile_from_json, values["profiles"]))
        paths = {key: Path(values[key]) for key in ("onnx", "engine", "timing_cache") if values[key] is not None}
        capabilities = tuple(values["compute_capabilities"])
        return cls(**{**values, **paths, "profiles": profiles, "compute_capabilities": capabilities})


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """What is known of an engine from the network that it was built from, and from what TensorRT said.

    Attributes:
        library: version of TensorRT.
        inputs: name and numpy dtype.
        outputs: likewise.
        layers: how many layers of each kind and type of output, e.g. ``MATRIX_MULTIPLY float32``.
        memory: bytes of ``activations``, ``weights`` and ``scratch``, where TensorRT logged them.
    """

    library: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    layers: dict[str, int]
    memory: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of progress on the process's stdout: ``done`` of ``total`` steps of ``phase``."""

    phase: str
    done: int
    total: int

    def line(self) -> str:
        """As it is written."""
        return json.dumps(dataclasses.astuple(self)) + "\n"

    @classmethod
    def parse(cls, line: str) -> "Step":
        """What ``line`` wrote.

        >>> Step.parse(Step("Timing tactics", 1, 3).line())
        Step(phase='Timing tactics', done=1, total=3)
        """
        return cls(*json.loads(line))
