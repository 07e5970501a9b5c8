"""Graphs that tests write in ONNX's own text, as files."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser


def written(text: str, path: Path, **weights: np.ndarray) -> Path:
    """The model ``text`` as a file, with ``weights``."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, path)
    return path
