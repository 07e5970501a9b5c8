"""Kernels that TensorRT-RTX compiled on this GPU, kept beside the engine: the next session starts with them."""

import contextlib
from pathlib import Path
from typing import Any

from moe_spec.files import new_file

RUNTIME_CACHE = "runtime.cache"


class RuntimeCache:
    """TensorRT-RTX compiles kernels when an engine first runs; they are kept in a file. TensorRT has no such thing."""

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        self._engine, self._path, self._cache, self._config = engine, path, None, None
        self.captures = hasattr(trt, "CudaGraphStrategy")
        """Whether the library captures CUDA graphs itself."""
        if not self.captures:
            return
        self._config = engine.create_runtime_config()
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self._config.create_runtime_cache()
        self._before = path.read_bytes() if path.is_file() else b""
        if self._before:
            self._cache.deserialize(self._before)  # one of another GPU or version is not taken, and written anew
        self._config.set_runtime_cache(self._cache)

    def create_context(self) -> Any:
        """An execution context that uses the cache."""
        return self._engine.create_execution_context(*([] if self._config is None else [self._config]))

    def save(self) -> None:
        """Write the file, where kernels were added and the directory can be written to."""
        if self._cache is None:
            return
        after = bytes(self._cache.serialize())
        if after != self._before:
            with contextlib.suppress(OSError), new_file(self._path) as staging:
                staging.write_bytes(after)
