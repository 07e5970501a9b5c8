"""An engine that runs on a GPU.

Uploads, execution and downloads go onto one stream, which is waited for once a run. Device buffers stay between runs.
A decoder's cache stays there from step to step, in two buffers that take turns.
What comes with the same shapes again is replayed as a CUDA graph: TensorRT-RTX captures it itself, for TensorRT it is
done here.

Executed by the tests: over a stand-in for the GPU and the engine. It has not run on a GPU yet.
"""

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from moe_spec.decoder import PRESENT, as_past, complete
from moe_spec.errors import UserError
from moe_spec.manifest import Manifest, TensorSpec
from moe_spec.runner import Arrays, Feeds, Kept
from runtime.backend import AMPERE_PLUS
from runtime.engine import profiles_of, rebuild
from runtime.inputs.feeds import check_feeds, select_outputs
from runtime.profiles import first_that_takes
from runtime.targets import version_fits
from runtime.tensorrt.driver import Driver, compute_capability_here
from runtime.tensorrt.failures import tidy
from runtime.tensorrt.listeners import make_allocator, make_logger
from runtime.tensorrt.runtime_cache import RUNTIME_CACHE, RuntimeCache

_GRAPHS = 8  # shapes whose CUDA graphs are kept

Key = tuple[tuple[int, ...], ...]


def require_gpu(manifest: Manifest, engine_dir: Path) -> None:
    """Refuse to open an engine that this machine's GPU cannot run.

    Raises:
        UserError: there is no GPU, or one of another compute capability.
    """
    built: Sequence[str] = manifest.details["compute_capabilities"]
    needed, found = " or ".join(built), compute_capability_here()
    if found is None:
        raise UserError(
            f"{engine_dir} is built, but running it needs a GPU of compute capability {needed} with its NVIDIA driver, "
            "and there is none here",
            hint="copy the directory to such a device; here, run or verify the model directory that it was built from",
        )
    ampere_plus = manifest.details.get("hardware_compatibility") == AMPERE_PLUS
    if found not in built and not (ampere_plus and version_fits(found, ">=8.0")):
        raise UserError(
            f"{engine_dir} needs a GPU of compute capability {needed}, this one has {found}", hint=rebuild(manifest)
        )


@dataclasses.dataclass(frozen=True)
class _OnGpu:
    """A part of a decoder's cache: the buffer that a step left it in."""

    buffer: str
    shape: tuple[int, ...]


class EngineSession:
    """A deserialised engine with its buffers. Left by the ``with`` block, it frees them."""

    def __init__(self, trt: Any, plan: Path, manifest: Manifest, driver: Driver | None = None) -> None:
        """Deserialise ``plan``.

        Raises:
            UserError: TensorRT cannot read it on this machine, or numpy has no type for an input or output.
        """
        self.inputs = manifest.inputs
        self.outputs = manifest.outputs
        self._types = {spec.name: _numpy_type(spec, plan) for spec in (*self.inputs, *self.outputs)}
        self._where = str(plan.parent)
        self._profiles = profiles_of(manifest)
        self._profile = 0
        self._graphs: OrderedDict[Key, Any] = OrderedDict()
        self._seen: Key | None = None
        self._turn = False
        with contextlib.ExitStack() as undo:
            self._driver = undo.enter_context(Driver() if driver is None else driver)
            self._logger = make_logger(trt)
            self._runtime = trt.Runtime(self._logger)
            if manifest.details.get("version_compatible"):
                self._runtime.engine_host_code_allowed = True  # the engine brings the runtime of its version
            self._engine = self._runtime.deserialize_cuda_engine(np.memmap(plan, np.uint8, "r"))
            if self._engine is None:
                raise UserError(
                    f"{plan} cannot be deserialised on this GPU: {tidy(self._logger.errors)}", hint=rebuild(manifest)
                )
            if manifest.details.get("weight_streaming"):
                _stream_weights(self._engine)
            self._kernels = RuntimeCache(trt, self._engine, plan.with_name(RUNTIME_CACHE))
            self._context = self._kernels.create_context()
            self._allocator = make_allocator(trt, self._driver)
            self._capture = not self._kernels.captures and not manifest.details.get("weight_streaming")
            self._undo = undo.pop_all()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name, those asked for or all.

        Raises:
            UserError: the feeds do not fit the inputs or any profile, an output is unknown, or the GPU fails.
        """
        check_feeds(self.inputs, feeds, self._where)
        names = select_outputs(self.outputs, outputs, self._where)
        self._give(feeds)
        shapes = {spec.name: self._allocate(spec, spec.name) for spec in self.outputs}
        self._execute(tuple(feeds[spec.name].shape for spec in self.inputs), shapes)
        results = {spec.name: self._fetch(spec, shapes[spec.name]) for spec in self.outputs if spec.name in names}
        self._driver.synchronize()
        return results

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:
        """A step of a decoder; its cache stays on the GPU: what one step wrote, the next one reads where it is.

        Only the cache that the last step gave can be handed on: the one before lies where the next one is written.

        Raises:
            UserError: the feeds do not fit the inputs or any profile, or the GPU fails.
        """
        given: dict[str, Any] = complete(self.inputs, {**feeds, **(kept or {})})
        if not kept:
            check_feeds(self.inputs, given, self._where)
        self._give(given)
        self._turn = not self._turn
        places = {spec.name: self._place(spec.name) for spec in self.outputs}
        shapes = {spec.name: self._allocate(spec, places[spec.name]) for spec in self.outputs}
        self._enqueue()  # the cache is longer each time, so that there is nothing to replay
        results: dict[str, Any] = {
            name: _OnGpu(places[name], shape)
            for name, shape in shapes.items()
            if name.startswith(PRESENT) and shape is not None
        }
        results |= {
            spec.name: self._fetch(spec, shapes[spec.name]) for spec in self.outputs if spec.name not in results
        }
        self._driver.synchronize()
        return {name: value for name, value in results.items() if not name.startswith(PRESENT)}, as_past(results)

    def _place(self, output: str) -> str:
        """The buffer of an output of a step: parts of the cache have two, which take turns."""
        return f"{output} {int(self._turn)}" if output.startswith(PRESENT) else output

    def _give(self, feeds: Mapping[str, Any]) -> None:
        """Choose the profile, and tell where every input lies: arrays are copied to the GPU."""
        self._driver.make_current()
        self._logger.errors.clear()
        self._choose_profile(feeds)
        for name, value in feeds.items():
            if not self._context.set_input_shape(name, value.shape):
                raise self._failure()
            if isinstance(value, _OnGpu):
                address = self._driver.buffer(value.buffer, 0)
            else:
                address = self._buffer(name, value.nbytes)
                self._driver.upload(address, np.ascontiguousarray(value))
            self._context.set_tensor_address(name, address)

    def _choose_profile(self, feeds: Mapping[str, Any]) -> None:
        """Switch to the first profile that takes these shapes."""
        index = first_that_takes(self._profiles, feeds)
        if index is None:
            found = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            ranges = "; ".join(
                ", ".join(f"{name} {list(shapes.min)} to {list(shapes.max)}" for name, shapes in profile.items())
                for profile in self._profiles
            )
            raise UserError(
                f"{self._where}: the inputs are {found}, the engine was built for {ranges}",
                hint="feed other shapes, or build it again with a wider profile",
            )
        if index != self._profile:  # which follows from the shapes, so that graphs need not be told apart by it
            self._context.set_optimization_profile_async(index, self._driver.stream.value)
            self._driver.synchronize()
            self._profile = index

    def _allocate(self, spec: TensorSpec, buffer: str) -> tuple[int, ...] | None:
        """Give an output that buffer; its shape, which follows from the inputs', or None where the data decide."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if any(dim < 0 for dim in shape):
            self._context.set_output_allocator(spec.name, self._allocator)
            return None
        size = int(np.prod(shape)) * self._types[spec.name].itemsize
        if buffer != spec.name:
            size = _with_room(size)
        self._context.set_tensor_address(spec.name, self._buffer(buffer, size))
        return shape

    def _buffer(self, name: str, size: int) -> int:
        """A device buffer; graphs know addresses, so none outlives a buffer that moved."""
        before = self._driver.buffer(name, 0)
        address = self._driver.buffer(name, size)
        if address != before:
            self._forget_graphs()
        return address

    def _execute(self, key: Key, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
        """Put the engine on the stream: as a graph once the shapes were the same twice in a row."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self._driver.launch(graph)
            return
        repeated, self._seen = key == self._seen, key
        self._enqueue()
        if repeated and self._capture and None not in shapes.values():
            self._keep_graph(key)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._driver.stream.value):
            raise self._failure()

    def _failure(self) -> UserError:
        said = tidy(self._logger.errors)
        return UserError(f"{self._where} failed on the GPU: {said}", hint="check the GPU with nvidia-smi")

    def _keep_graph(self, key: Key) -> None:
        graph = self._driver.capture(lambda: bool(self._context.execute_async_v3(self._driver.stream.value)))
        if graph is None:
            self._capture = False  # this engine cannot be captured, it runs as it did
            return
        self._graphs[key] = graph
        if len(self._graphs) > _GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            self._driver.forget(oldest)

    def _fetch(self, spec: TensorSpec, shape: tuple[int, ...] | None) -> np.ndarray[Any, Any]:
        if shape is None:
            self._driver.synchronize()  # only now is it known
            shape = self._allocator.shapes[spec.name]
        return self._driver.download(self._driver.buffer(spec.name, 0), shape, self._types[spec.name])

    def _forget_graphs(self) -> None:
        for graph in self._graphs.values():
            self._driver.forget(graph)
        self._graphs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget_graphs()
        self._kernels.save()
        self._context = self._engine = self._runtime = None  # before the context that they live in
        self._undo.close()


def _with_room(size: int) -> int:
    """Up to a quarter more, so that a buffer that grows with every step seldom moves.

    >>> _with_room(1000), _with_room(1024), _with_room(1025)
    (1024, 1024, 1280)
    """
    granule = 1 << max(0, size.bit_length() - 3)
    return -(-size // granule) * granule


def _stream_weights(engine: Any) -> None:
    """Keep as many weights on the GPU as TensorRT sees room for."""
    engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()


def _numpy_type(spec: TensorSpec, plan: Path) -> np.dtype[Any]:
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  # numpy knows bfloat16 from then on
    try:
        return np.dtype(spec.dtype)
    except TypeError as error:
        raise UserError(
            f"{plan}: {spec.name} is {spec.dtype}, which numpy does not know",
            hint="pip install ml_dtypes; or export the model with float inputs and outputs",
        ) from error
