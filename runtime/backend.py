"""What it takes to be a backend: refuse with reasons, build, open."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.runner import Arrays, Feeds
from runtime.profiles import Profile
from runtime.targets import Target

ENGINE = "engine"
"""``Manifest.kind`` of a directory that a backend built."""
ENGINE_FILE = "model.engine"
"""A serialised engine in it; ONNX Runtime's is a ``model.onnx``."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What a build may be told.

    Attributes:
        profile: range of each dynamic input; None for the default of ``profiles.default_profile``.
        workspace_bytes: scratch memory that a kernel may use; None for all there is.
        optimization_level: 0 (quick build) to 5 (quick engine); None for the backend's own default.
    """

    profile: Profile | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None


class Session(Protocol):
    """A model that is ready to run; leave the ``with`` block to free it."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` gives."""
        ...

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name, those asked for or all.

        Raises:
            UserError: an input is missing, unknown, or of another type or shape; or an output is unknown.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """A runtime that turns model directories into engines, and opens them. It knows nothing about MoE."""

    @property
    def name(self) -> str:
        """As in ``targets.TARGETS`` and in an engine's manifest."""
        ...

    def why_not(self, model_dir: Path, target: Target) -> list[str]:
        """Reasons why this model cannot be built for ``target`` here; empty: it can."""
        ...

    def build(self, model_dir: Path, target: Target, options: BuildOptions, out_dir: Path) -> Manifest:
        """Write an engine directory; nothing is left under ``out_dir`` when it fails."""
        ...

    def open(self, engine_dir: Path) -> Session:
        """An engine directory as a session.

        Raises:
            UserError: the engine is damaged, or was built for another device or library version.
        """
        ...
