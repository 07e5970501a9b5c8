"""What it takes to be a backend: refuse with reasons, build, open."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.progress import Progress, silent
from moe_spec.runner import Arrays, Feeds, Kept
from runtime.profiles import Profile, show_options
from runtime.targets import Target

ENGINE = "engine"
"""``Manifest.kind`` of a directory that a backend built."""
ENGINE_FILE = "model.engine"
"""A serialised engine in it; ONNX Runtime's is a ``model.onnx``."""

AMPERE_PLUS, SAME_CAPABILITY = "ampere+", "sameComputeCapability"
"""Values of ``BuildOptions.hardware_compatibility``, as trtexec calls them."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What a build may be told.

    Attributes:
        profiles: each the range of every dynamic input; empty for the default of ``profiles.default_profile``.
        workspace_bytes: scratch memory that a kernel may use; None for all there is.
        optimization_level: 0 (quick build) to 5 (quick engine); None for the backend's own default.
        weight_streaming: whether weights may stay in the host's memory when the engine runs.
        also: further targets that the same TensorRT-RTX engine must run on.
        timing_cache: TensorRT's, made where it does not exist: later builds measure no kernel that is in it.
        version_compatible: whether newer versions of TensorRT may run the engine.
        hardware_compatibility: ``AMPERE_PLUS`` or ``SAME_CAPABILITY``, which other GPUs may run a TensorRT engine; None
            for GPUs like this one.
    """

    profiles: tuple[Profile, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    also: tuple[Target, ...] = ()
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: str | None = None

    def arguments(self) -> list[str]:
        """As they are given to ``moe-edge build``.

        >>> BuildOptions(workspace_bytes=1 << 30, version_compatible=True).arguments()
        ['--workspace 1024', '--version-compatible']
        """
        given = {
            "--workspace": None if self.workspace_bytes is None else self.workspace_bytes >> 20,
            "--optimization-level": self.optimization_level,
            "--timing-cache": self.timing_cache,
            "--hardware-compatibility": self.hardware_compatibility,
        }
        flags = {"--weight-streaming": self.weight_streaming, "--version-compatible": self.version_compatible}
        return [
            *(show_options(profile) for profile in self.profiles if profile),
            *(f"{option} {value}" for option, value in given.items() if value is not None),
            *(f"--also {target.name}" for target in self.also),
            *(flag for flag, is_set in flags.items() if is_set),
        ]


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

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:
        """A step of a decoder, whose cache may stay where it was computed.

        Args:
            feeds: ids, and whatever else `moe_spec.decoder.complete` does not add.
            kept: the second half of what the last step returned, None where nothing was seen yet. A session may write
                over what earlier steps left.

        Returns:
            The outputs that are no cache, and the cache: empty where the model has none.

        Raises:
            UserError: as ``run``.
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

    def why_not_here(self, target: Target) -> list[str]:
        """Reasons why nothing can be built for ``target`` on this machine."""
        ...

    def build(
        self,
        model_dir: Path,
        target: Target,
        options: BuildOptions,
        out_dir: Path,
        on_progress: Progress = silent,
    ) -> Manifest:
        """Write an engine directory; nothing is left under ``out_dir`` when it fails."""
        ...

    def open(self, engine_dir: Path) -> Session:
        """An engine directory as a session.

        Raises:
            UserError: the engine is damaged, or was built for another device or library version.
        """
        ...
