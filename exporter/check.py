"""Trust nothing of a trace: count the experts, run shapes that were not traced, compare with torch."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from transformers import PreTrainedModel

from exporter.rounding import run_in_double
from exporter.tasks import Task
from exporter.trace import run_torch
from exporter.widen import save_widened
from models.moe_layers import MoELayer, tensors_of_routers
from moe_spec.dataset import MASK
from moe_spec.decoder import BATCH, PAST_LENGTH, SEQUENCE, TOTAL_LENGTH
from moe_spec.errors import UserError, VerificationError
from moe_spec.experts_op import DOMAIN
from moe_spec.progress import Progress, counted, silent
from moe_spec.record import Json
from moe_spec.runner import Arrays, Feeds, Runner, error_between

SHAPES = ((1, 1), (3, 7), (2, 12))
"""(batch, sequence) that were not traced; the first is a single token or example."""

SHAPES_WITH_CACHE = ((1, 1, 0), (1, 1, 6), (3, 7, 0), (2, 12, 5))
"""(batch, sequence, tokens in the cache) of a decoder with one; where there are several examples, one is padded."""

TOLERANCE = 1e-5
"""Of the float32 outputs, relative to the largest magnitude of the output."""

ROUNDING = 4.0
"""How many times further than torch's float32 the graph may be from torch's float64, where that is more."""

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float32: TOLERANCE,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}
"""The same by the dtype of the graph. In halves the graph's own numbers are rounded, above all the scale of attention,
by up to half an epsilon each; with that scale unrounded, what is left of mixtral's error in bfloat16 is 7e-7."""


def check_experts(proto: onnx.ModelProto, layers: Sequence[MoELayer]) -> None:
    """Every layer that is an experts node must be in the graph with every expert: tracing can lose some.

    Raises:
        UserError: a layer is missing, or has another number of experts than the model.
    """
    experts = {tensor.name: tensor.dims[0] for tensor in proto.graph.initializer if tensor.dims}
    found = {
        node.name.removesuffix(".experts"): experts[node.input[3]]
        for node in proto.graph.node
        if node.domain == DOMAIN and node.input[3] in experts
    }
    for layer in layers:
        if found.get(layer.name) != layer.num_experts:
            raise UserError(
                f"the traced graph has {found.get(layer.name, 'no')} experts in layer {layer.name}, "
                f"the model has {layer.num_experts}",
                hint="this is a fault of the export, not of your model: please report it with the model's config.json",
            )


def check_axes(proto: onnx.ModelProto, task: Task) -> None:
    """Every axis that should be dynamic must be.

    Raises:
        VerificationError: one is not.
    """
    shapes = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    for name, axes in task.axes.items():
        for axis, length in axes.items():
            if name in shapes and not shapes[name][axis].dim_param:
                raise VerificationError(
                    f"axis {axis} ({length}) of input {name} came out static: it is {shapes[name][axis].dim_value}"
                )


def check_parity(
    model: PreTrainedModel,
    task: Task,
    path: Path,
    runner: Runner,
    dtype: torch.dtype = torch.float32,
    on_progress: Progress = silent,
) -> list[Json]:
    """Run ``path`` at shapes that were not traced and compare each output with torch; the errors, for the manifest.

    Both compute in float32. Where the graph is of halves, so are the weights of ``model`` afterwards, but for routers,
    and a graph of float32 with the same weights is run, which ONNX Runtime has kernels for. ``on_progress`` is told of
    every shape.

    Raises:
        VerificationError: the graph does not run at one of them, an axis came out static, or an output differs by more
            than `TOLERANCE`, and by more than rounding explains. What a padded token gives is compared nowhere.
    """
    rng = np.random.default_rng(1)
    shapes: Sequence[tuple[int, ...]] = SHAPES_WITH_CACHE if task.states else SHAPES
    if dtype != torch.float32:
        _round(model, dtype)
    batches = [_example(model, task, shape, rng) for shape in shapes]
    if dtype == torch.float32:
        results = _run(runner, path, batches)
    else:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            save_widened(path, Path(scratch) / path.name)
            results = _run(runner, Path(scratch) / path.name, batches)
    runs = zip(shapes, batches, results, strict=True)
    return [
        entry
        for shape, feeds, got in counted(runs, "comparing with torch", len(shapes), on_progress)
        for entry in _compare(model, task, shape, feeds, got, TOLERANCES[dtype])
    ]


def _example(model: PreTrainedModel, task: Task, shape: tuple[int, ...], rng: np.random.Generator) -> Feeds:
    """Random tokens, after as many others as are in the cache; it holds what ``model`` keeps of those.

    A trained model that is given random keys and values magnifies rounding: SmolLM2 in float32 is then 8e-5 of its
    range from itself in float64, with keys and values of its own 4e-6.
    """
    feeds = task.example(model.config, *shape[:2], rng, *shape[2:])
    batch, _, past = (*shape, 0)[:3]
    if past:
        kept = run_torch(model, task, task.example(model.config, batch, past, rng, 0))
        feeds |= {state.past: kept[state.present] for state in task.states}
    return feeds


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    wide = tensors_of_routers(model)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name not in wide:
            value.copy_(value.to(dtype))


def _run(runner: Runner, path: Path, batches: Sequence[Feeds]) -> list[Arrays]:
    try:
        return runner.run(path, batches)
    except UserError as error:
        raise VerificationError(f"the graph does not run at shapes that were not traced: {error.what}") from error


def _compare(
    model: PreTrainedModel, task: Task, shape: Sequence[int], feeds: Feeds, got: Arrays, tolerance: float
) -> Iterator[Json]:
    expected = run_torch(model, task, feeds)
    exact: Arrays | None = None  # asked for where rounding may be the reason
    said = f"batch and sequence {tuple(shape[:2])}" + (f" with {shape[2]} tokens in the cache" if shape[2:] else "")
    for name, wanted in expected.items():
        if got[name].shape != wanted.shape:
            raise VerificationError(
                f"{_static_axis(shape, wanted.shape, got[name].shape)} of output {name} came out static: it has shape "
                f"{got[name].shape} for {said}, torch gives {wanted.shape}"
            )
        largest, relative = _error(task, name, feeds, wanted, got[name])
        entry = {"shape": list(shape), "output": name, "max_abs": largest, "max_rel": relative}
        if relative > tolerance:
            exact = run_in_double(model, task, feeds) if exact is None else exact
            own, of_graph = (_error(task, name, feeds, exact[name], one)[1] for one in (wanted, got[name]))
            if not of_graph <= ROUNDING * own < np.inf:
                raise VerificationError(
                    f"output {name} differs from torch by {relative:.2e} of its range at {said}, allowed is "
                    f"{tolerance:.0e}"
                )
        yield entry


def _error(task: Task, name: str, feeds: Feeds, wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[float, float]:
    """The largest difference between two outputs, and as a share of the largest value, where tokens are no padding."""
    axis = _token_axis(task, name)
    both = (wanted, got)
    return error_between(*(both if axis is None else (_seen(each, axis, feeds[MASK]) for each in both)))


def _static_axis(shape: Sequence[int], expected: Sequence[int], got: Sequence[int]) -> str:
    """The first axis that differs, and what it should have counted."""
    batch, sequence, past = (*shape, 0)[:3]
    names = {sequence: SEQUENCE, past + sequence: TOTAL_LENGTH if past else SEQUENCE, batch: BATCH}
    axis = next((axis for axis, (one, other) in enumerate(zip(expected, got, strict=False)) if one != other), len(got))
    return f"axis {axis} ({names.get(expected[axis], 'unknown')})"


def _token_axis(task: Task, output: str) -> int | None:
    """The axis of a decoder's output that counts tokens, if one does."""
    if output in task.outputs:
        return 1 if task.states else None
    (state,) = (state for state in task.states if state.present == output)
    return state.shape.index(PAST_LENGTH) if PAST_LENGTH in state.shape else None


def _seen(array: npt.NDArray[Any], axis: int, mask_BT: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N, ...): what belongs to the tokens that are no padding."""
    by_token = np.moveaxis(array, axis, 1)
    seen: npt.NDArray[Any] = by_token[mask_BT[:, -by_token.shape[1] :] != 0]
    return seen
