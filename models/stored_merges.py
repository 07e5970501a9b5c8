"""Merged experts of a checkpoint, computed from its files whenever they are asked for, one after the other."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.families import family_of
from models.merged_experts import MergedExperts
from models.moe_layers import MoELayer, find_moe_layers, tensors_of_routers
from models.stored_parameters import StoredParameters
from moe_spec.layer_plan import ALIAS, LayerPlan
from moe_spec.plan import PruningPlan


class StoredMerges:
    """The parameters of the experts that a plan merges: a few experts of one layer are in memory at a time."""

    def __init__(self, model: PreTrainedModel, stored: StoredParameters, plan: PruningPlan) -> None:
        """Nothing is read yet.

        Args:
            model: says how weights lie; it needs no values.
            stored: the parameters of the experts as they were.
            plan: of that model.
        """
        self._stored = stored
        self._whole = functools.lru_cache(maxsize=2)(stored.__getitem__)  # what goes into an expert, and what comes out
        self._merged: dict[str, tuple[MergedExperts, LayerPlan]] = {}
        self.parameters: list[tuple[str, ...]] = []
        """For each layer the names of its experts' parameters."""
        experts = family_of(model.config).experts
        for layer in find_moe_layers(model):
            planned = plan.layer(layer.name)
            if planned is not None and planned.merge:
                self._add(f"{layer.name}.{experts}", layer, planned)

    def _add(self, path: str, layer: MoELayer, plan: LayerPlan) -> None:
        def read(name: str, expert: int) -> Tensor:
            if not self._stored.lies_by_expert(f"{path}.{name}"):
                return self._whole(f"{path}.{name}")[expert]
            (piece,) = self._stored.pieces(f"{path}.{name}", [expert])
            return piece[0]

        merged = MergedExperts(layer.experts, plan, read)
        names = tuple(f"{path}.{name}" for name, _ in layer.experts.named_parameters(recurse=False))
        self._merged.update(dict.fromkeys(names, (merged, plan)))
        self.parameters.append(names)

    def __contains__(self, name: object) -> bool:
        return name in self._merged

    def pieces(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """What is left of a parameter, expert by expert: the mean of each group, for each row of a router that stays.

        Args:
            name: of the parameter.
            dtype: what it is cast to, by way of float32 as in memory; None: float32.
        """
        merged, plan = self._merged[name]
        for survivor in plan.survivor_of if plan.router == ALIAS else plan.keep:
            yield merged.parameter(name.rpartition(".")[2], survivor)[None].float().to(dtype or torch.float32)


def fill_routers(model: PreTrainedModel, stored: StoredParameters) -> set[str]:
    """Read the routers of ``model``, which has no values, to average or draw them; their parameters and buffers."""
    names = tensors_of_routers(model)
    for name in names:
        path, _, attribute = name.rpartition(".")
        module, values = model.get_submodule(path), stored[name]
        is_parameter = attribute in module._parameters
        setattr(module, attribute, torch.nn.Parameter(values, requires_grad=False) if is_parameter else values)
    return names
