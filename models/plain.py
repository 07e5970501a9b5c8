"""Any torch module with MoE blocks, once its user has said what router and experts of a block are.

::

    def adapt(block):                                    # what a block computes, in standard parts
        up_ENH, down_EHF = (torch.stack([getattr(one, name).weight for one in block.experts]) for name in ("w1", "w2"))
        return SparseMoe(TopKRouter(block.gate.weight, top_k=2), StackedExperts(up_ENH, down_EHF, relu, gated=False))

    model = plain_model(net, {"MyMoe": adapt}, lambda batch, length: {"x": torch.randn(batch, length, 64)})

``model`` is taken by whatever takes a model in memory: ``pruning.collect.collect``, ``pruning.apply.apply_plan``,
``exporter.module.export_module``. The ONNX file goes through every verb of the command line.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from models.adapters import Blocks, replace_blocks
from models.families import PLAIN
from models.moe_block import TopKRouter
from moe_spec.errors import UserError
from moe_spec.runner import error_between

Example = Callable[[int, int], Mapping[str, Tensor]]
"""``example(batch, length)``: inputs of the module by the names of its arguments, of these sizes."""

TRIED = (2, 5)
"""Batch and length of the inputs on which adapted and original are compared."""

TOLERANCE = 1e-5
"""Of the outputs, relative to the largest magnitude of each."""


class PlainConfig(PreTrainedConfig):  # type: ignore[no-untyped-call] # its __init_subclass__ is not annotated
    """Nothing but the name of a family: all that there is to say a plain module says itself."""

    model_type = PLAIN.model_type


class PlainModel(PreTrainedModel):  # type: ignore[no-untyped-call] # as PlainConfig
    """A torch module, with what a transformers model has around it.

    Attributes:
        module: the module; the names of its parameters begin with ``module.``.
        example: gives inputs of a size.
        outputs: names of what it gives.
    """

    config_class = PlainConfig

    def __init__(self, module: nn.Module, example: Example, outputs: Sequence[str]) -> None:
        super().__init__(PlainConfig())
        self.module, self.example, self.outputs = module, example, tuple(outputs)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name."""
        given = self.module(**inputs)
        given = given if isinstance(given, tuple | list) else (given,)
        if len(given) < len(self.outputs):
            raise UserError(
                f"the module gives {len(given)} results, but {len(self.outputs)} outputs are named",
                hint=f"name {len(given)} at most",
            )
        return dict(zip(self.outputs, given, strict=False))

    def sha256(self) -> str:
        """What plans and statistics of this model carry: a hash over names, shapes and values of its weights."""
        digest = hashlib.sha256()
        for name, values in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def plain_model(
    module: nn.Module, blocks: Blocks, example: Example, outputs: Sequence[str] = ("output",)
) -> PlainModel:
    """``module`` in eval mode, its MoE blocks replaced by standard ones, which is proven on example inputs.

    Args:
        module: changed in place.
        blocks: for each class of MoE blocks, by its name, what makes a standard one of a block: a module that takes
            and gives what the block does, with a ``SparseMoe`` in it or as a subclass of it.
        example: inputs of a size.
        outputs: names for the first results of ``module``; further ones are left out.

    Raises:
        UserError: ``module`` has no such block, or computes something else with the new ones.
    """
    nn.Module.eval(module)
    model = PlainModel(module, example, outputs)
    inputs = example(*TRIED)
    with torch.no_grad():
        expected = model(**inputs)
        _require_blocks(module, blocks)
        replace_blocks(model, blocks)
        for router in (part for part in module.modules() if isinstance(part, TopKRouter) and part.bias is None):
            router.bias = nn.Parameter(torch.zeros_like(router.weight[:, 0]))  # all routers of a family hold the same
        got = model(**inputs)
    for name, wanted in expected.items():
        _, error = error_between(wanted.numpy(), got[name].numpy())
        if not error <= TOLERANCE:
            raise UserError(
                f"with its blocks adapted the module gives another {name}: it differs by {error:.1e} of its range, "
                f"allowed is {TOLERANCE:.0e}",
                hint="an adapter computes what its block computes in eval mode: look at the order of gate and up, at "
                "renormalize, at biases, and at tokens that a full expert drops",
            )
    return model


def _require_blocks(module: nn.Module, blocks: Mapping[str, Any]) -> None:
    there = sorted({type(part).__name__ for part in module.modules()})
    missing = [name for name in blocks if name not in there]
    if missing or not blocks:
        raise UserError(
            f"none of the modules is a {missing[0]!r}" if missing else "no class of blocks is named",
            hint=f"the classes of its modules are {', '.join(there)}",
        )
