"""The one place that imports TensorRT."""

from typing import Any

from moe_spec.errors import UserError
from runtime.targets import TENSORRT, TENSORRT_RTX

PACKAGES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
"""Python package of each backend; also its key in ``Manifest.tools``."""


def load_library(backend: str) -> Any:
    """The Python module of TensorRT or TensorRT-RTX.

    Raises:
        UserError: it is not installed, or its shared libraries cannot be loaded.
    """
    try:
        if backend == TENSORRT_RTX:
            import tensorrt_rtx as trt
        else:
            import tensorrt as trt
    except (ImportError, OSError) as error:
        raise UserError(
            f"{PACKAGES[backend]} cannot be imported: {error}", hint=f"pip install 'moe-edge[{backend}]'"
        ) from error
    return trt
