"""A checkpoint in torch that is run like an ONNX file: what an export is verified against, and timed against.

T tokens, E experts, K of them selected.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from exporter.tasks import Task, task_like, task_of, with_cache
from exporter.trace import run_as_set, run_torch
from models.checkpoints import load_model
from models.moe_layers import MoELayer, find_moe_layers, require_token_choice
from moe_spec.decoder import has_cache, step_in_memory
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.manifest import BlockEntry, Manifest, TensorSpec
from moe_spec.plan import PruningPlan
from moe_spec.runner import Arrays, Feeds, Kept

KIND = "checkpoint"
"""``Manifest.kind`` of a checkpoint that stands beside an export of it."""

_HALVES = ("float16", "bfloat16")


class TorchSession:
    """A transformers model, its experts computed as transformers does by default."""

    def __init__(self, model: PreTrainedModel, like: Manifest) -> None:
        self.model, self.task = model, _task_like(model, like)
        self.inputs: tuple[TensorSpec, ...] = like.inputs
        self.outputs: tuple[TensorSpec, ...] = like.outputs

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name, those asked for or all."""
        values = self._run({name: _readable(array) for name, array in feeds.items()})
        return values if outputs is None else {name: values[name] for name in outputs}

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:
        """A step of a decoder."""
        return step_in_memory(self.run, self.inputs, feeds, kept)

    def _run(self, feeds: Feeds) -> Arrays:
        return run_as_set(self.model, self.task, feeds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class ObservedTorchSession(TorchSession):
    """The same by transformers' reference loop, with gates and scores (T, E) of every MoE layer as further outputs."""

    def __init__(self, model: PreTrainedModel, like: Manifest) -> None:
        super().__init__(model, like)
        self._layers = find_moe_layers(model)

    def _run(self, feeds: Feeds) -> Arrays:
        seen: Arrays = {}
        with contextlib.ExitStack() as stack:
            ranked = stack.enter_context(_Ranked())
            for layer in self._layers:
                stack.enter_context(_watched(layer, ranked, seen))
            return run_torch(self.model, self.task, feeds) | seen


def open_checkpoint(
    directory: Path, like: Manifest, plan: PruningPlan | None = None, *, trust_remote_code: bool = False
) -> tuple[ObservedTorchSession, Manifest]:
    """The checkpoint in ``directory`` in float32, called as the export of manifest ``like`` is, and a manifest of it.

    Args:
        directory: of the checkpoint.
        like: tells its inputs and outputs.
        plan: what it was pruned by, for the ids that its experts had before; None: ids are its own.
        trust_remote_code: run the Python files that config.json names (`models.own_code`).

    Raises:
        UserError: no checkpoint that can be loaded, one that ``plan`` did not make, or of a model in which experts
            choose their tokens.
    """
    model = load_model(directory, trust_remote_code=trust_remote_code)
    layers = find_moe_layers(model)
    require_token_choice(layers)
    session = ObservedTorchSession(model, like)
    sha256 = checkpoint_sha256(directory)
    return session, Manifest(
        kind=KIND,
        source_sha256=sha256,
        parent_sha256=sha256,
        files=(),
        inputs=like.inputs,
        outputs=like.outputs,
        blocks=tuple(_entry(layer, _kept(layer, plan, directory)) for layer in layers),
        plan=plan,
        details={"number_formats": ["float32"]},
    )


def _readable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """As torch reads it: it may be written to, and is float32, as the model is, where the export takes halves."""
    is_half = array.dtype.name in _HALVES  # not by its kind: bfloat16 is none that numpy calls a float
    return np.require(array, np.float32 if is_half else None, requirements="W")


def _task_like(model: PreTrainedModel, like: Manifest) -> Task:
    """What ``like`` is an export for: it may have a cache, and it may lack the head."""
    task = task_of(type(model).__name__, task_like(spec.name for spec in like.outputs))
    return with_cache(task, model) if has_cache(like.inputs) else task


def _kept(layer: MoELayer, plan: PruningPlan | None, directory: Path) -> tuple[int, ...]:
    """The ids that the experts of ``layer`` had before ``plan``."""
    pruned = None if plan is None else plan.layer(layer.name)
    keep = tuple(range(layer.num_experts)) if pruned is None else pruned.keep
    if len(keep) != layer.num_experts:
        raise UserError(
            f"layer {layer.name} of {directory} has {layer.num_experts} experts, and the plan keeps {len(keep)}",
            hint="give the plan that it was pruned by: --plan",
        )
    return keep


def _entry(layer: MoELayer, keep: tuple[int, ...]) -> BlockEntry:
    gates, scores = _shown(layer)
    return BlockEntry(
        name=layer.name,
        experts=layer.num_experts,
        top_k=layer.top_k,
        keep=keep,
        router=layer.score,
        form=KIND,
        bytes=0,
        gates=gates,
        scores=scores,
    )


def _shown(layer: MoELayer) -> tuple[str, str]:
    """What the outputs with its gates and scores are called."""
    return f"{layer.name}/gates", f"{layer.name}/scores"


class _Ranked(TorchFunctionMode):
    """Within the block it sees what top-k is given: whatever biases and groups a family has, that is what is ranked.

    Attributes:
        last: what the last one was given.
    """

    last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look, and do what was asked for."""
        if func in (torch.topk, Tensor.topk):
            self.last = args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(layer: MoELayer, ranked: _Ranked, seen: Arrays) -> Iterator[None]:
    """Within the block, what the router of ``layer`` ranks and what its experts are given goes to ``seen``."""
    gates, scores = _shown(layer)

    def asked(_router: nn.Module, _inputs: Any) -> None:
        ranked.last = None

    def scored(_router: nn.Module, _inputs: Any, answer: tuple[Tensor, ...]) -> None:
        logits_TE = answer[0]  # a sparsemixer ranks these, and asks no top-k
        seen[scores] = (logits_TE if ranked.last is None else ranked.last).flatten(0, -2).float().numpy()

    def given(_experts: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        _, ids_TK, gates_TK = arguments
        gates_TE = torch.zeros(len(ids_TK), layer.num_experts)
        seen[gates] = gates_TE.scatter_(1, ids_TK, gates_TK.float()).numpy()

    hooks = (
        layer.router.register_forward_pre_hook(asked),
        layer.router.register_forward_hook(scored),
        layer.experts.register_forward_pre_hook(given),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
