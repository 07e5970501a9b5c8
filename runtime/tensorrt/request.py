"""What a build process is told, and what it tells back: two JSON files."""

import dataclasses
import json
from pathlib import Path

from runtime.profiles import Profile, ShapeRange

FACTS, ERROR = "facts.json", "error.json"


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    Attributes:
        backend: as in ``targets``.
        onnx: the graph; its weights lie beside it.
        engine: the file to write.
        compute_capability: of the target.
        profile: range of each dynamic input; empty where all shapes are fixed.
        workspace_bytes: as in ``BuildOptions``.
        optimization_level: likewise.
    """

    backend: str
    onnx: Path
    engine: Path
    compute_capability: str
    profile: Profile
    workspace_bytes: int | None
    optimization_level: int | None

    def save(self, path: Path) -> None:
        """Write the request."""
        path.write_text(json.dumps(dataclasses.asdict(self), default=str), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "BuildRequest":
        """Read a request that ``save`` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        profile = {
            name: ShapeRange(**{key: tuple(shape) for key, shape in row.items()})
            for name, row in values["profile"].items()
        }
        paths = {key: Path(values[key]) for key in ("onnx", "engine")}
        return cls(**{**values, **paths, "profile": profile})


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """What is known of an engine from the network that it was built from.

    Attributes:
        library: version of TensorRT.
        inputs: name and numpy dtype.
        outputs: likewise.
        layers: how many layers of each kind and type of output, e.g. ``MATRIX_MULTIPLY float32``.
    """

    library: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    layers: dict[str, int]
