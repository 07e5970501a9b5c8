"""How a stage that must *run* a graph gets hold of something that can, without importing it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Feeds = Mapping[str, npt.NDArray[Any]]
Arrays = dict[str, npt.NDArray[Any]]
Kept = Mapping[str, Any]
"""The cache of a decoder between two steps, by the names of the inputs that take it: only its session can read it."""

LOGITS = "logits"
"""The output that scores classes or tokens."""


class OpenModel(Protocol):
    """An ONNX file that is loaded."""

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name; ``outputs=None`` asks for all."""
        ...


class Runner(Protocol):
    """Runs an ONNX file. ``runtime.onnxruntime.backend.OnnxRuntimeRunner`` is the one that the command line injects."""

    def open(self, model: Path) -> AbstractContextManager[OpenModel]:
        """The file, loaded for many batches of which one is looked at after the other."""
        ...

    def run(self, model: Path, batches: Sequence[Feeds], outputs: Sequence[str] | None = None) -> list[Arrays]:
        """Outputs by name for each batch of feeds; ``outputs=None`` asks for all. The file is opened once."""
        ...


def error_between(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> tuple[float, float]:
    """Largest absolute difference, and that over the reference's largest magnitude; NaN anywhere counts as infinite.

    >>> error_between(np.array([1.0, -4.0]), np.array([1.0, -3.0]))
    (1.0, 0.25)
    >>> error_between(np.array([1.0]), np.array([np.nan]))
    (inf, inf)
    """
    if reference.shape != candidate.shape:
        return float("inf"), float("inf")
    if reference.size == 0:
        return 0.0, 0.0
    wide = np.float64
    difference = np.asarray(np.abs(reference.astype(wide) - candidate.astype(wide)))
    difference[reference == candidate] = 0.0  # equal infinities differ by nothing
    largest = float(np.nan_to_num(difference.max(), nan=np.inf))
    finite = np.abs(reference[np.isfinite(reference)].astype(wide))
    return largest, largest / max(float(finite.max()) if finite.size else 0.0, 1e-30)
