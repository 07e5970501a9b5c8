"""An engine that runs on a GPU.

Executed by the tests: the refusal on a machine without a GPU. ``EngineSession`` was type-checked and read against the
library's documentation only; it has not run on a GPU yet.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from moe_spec.errors import UserError
from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.runner import Arrays, Feeds
from runtime.engine import rebuild
from runtime.feeds import check_feeds, select_outputs
from runtime.tensorrt.driver import Driver, compute_capability_here


def require_gpu(manifest: Manifest, engine_dir: Path) -> None:
    """Refuse to open an engine that this machine's GPU cannot run.

    Raises:
        UserError: there is no GPU, or one of another compute capability.
    """
    needed, found = manifest.details["compute_capability"], compute_capability_here()
    if found is None:
        raise UserError(
            f"{engine_dir} is built, but running it needs a GPU of compute capability {needed} with its NVIDIA driver, "
            "and there is none here",
            hint="copy the directory to such a device; here, run or verify the model directory that it was built from",
        )
    if found != needed:
        raise UserError(
            f"{engine_dir} needs a GPU of compute capability {needed}, this one has {found}", hint=rebuild(manifest)
        )


class EngineSession:
    """A deserialised engine with its buffers. Left by the ``with`` block, it frees them."""

    def __init__(self, trt: Any, plan: Path, manifest: Manifest) -> None:
        """Deserialise ``plan``.

        Raises:
            UserError: TensorRT cannot read it on this machine.
        """
        self.inputs = manifest.inputs
        self.outputs = manifest.outputs
        self._where = str(plan.parent)
        self._profile = manifest.details["profile"]
        with contextlib.ExitStack() as undo:
            self._driver = undo.enter_context(Driver())
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
            if self._engine is None:
                raise UserError(f"{plan} cannot be deserialised on this GPU", hint=rebuild(manifest))
            self._context = self._engine.create_execution_context()
            self._undo = undo.pop_all()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name, those asked for or all.

        Raises:
            UserError: the feeds do not fit the inputs or the profile, or an output is unknown or data-dependent.
        """
        check_feeds(self.inputs, feeds, self._where)
        names = select_outputs(self.outputs, outputs, self._where)
        self._check_profile(feeds)
        for name, array in feeds.items():
            self._context.set_input_shape(name, array.shape)
            address = self._driver.buffer(name, array.nbytes)
            self._driver.upload(address, np.ascontiguousarray(array))
            self._context.set_tensor_address(name, address)
        shapes = {spec.name: self._allocate(spec) for spec in self.outputs}
        if not self._context.execute_async_v3(self._driver.stream.value):
            raise UserError(f"{self._where} failed on the GPU", hint="see TensorRT's messages above")
        results = {
            spec.name: self._driver.download(self._driver.buffer(spec.name, 0), shapes[spec.name], spec.dtype)
            for spec in self.outputs
            if spec.name in names
        }
        self._driver.synchronize()
        return results

    def _allocate(self, spec: TensorSpec) -> tuple[int, ...]:
        """Give an output a buffer; its shape, which follows from the inputs'."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if any(dim < 0 for dim in shape):
            raise UserError(
                f"{self._where}: the shape of output {spec.name} depends on the data",
                hint="write a form without data-dependent shapes: moe-edge optimize --form dense",
            )
        size = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
        self._context.set_tensor_address(spec.name, self._driver.buffer(spec.name, size))
        return shape

    def _check_profile(self, feeds: Feeds) -> None:
        for name, bounds in self._profile.items():
            shape, low, high = feeds[name].shape, tuple(bounds["min"]), tuple(bounds["max"])
            if not all(least <= dim <= most for least, dim, most in zip(low, shape, high, strict=True)):
                raise UserError(
                    f"{self._where}: input {name} has shape {shape}, the engine was built for {low} to {high}",
                    hint="feed other shapes, or build it again with a wider profile",
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context = self._engine = self._runtime = None  # before the context that they live in
        self._undo.close()
