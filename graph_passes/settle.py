"""What is to happen to a model: settled, and refused where it cannot be, before anything is written."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from graph_passes.casts import is_float32
from graph_passes.casts.assign import Formats
from graph_passes.config_file import read_config
from graph_passes.describe import Model, io_of
from graph_passes.graph.measure import Size, measure
from graph_passes.graph.qdq import rounds
from graph_passes.precision import AS_IT_IS, Precision
from graph_passes.quantization.activations import Activations
from graph_passes.quantization.quantize import Quantization
from graph_passes.quantization.rest import Rest, check_routers_known, nodes_of, quantize_rest
from graph_passes.record.prune import match_layers
from graph_passes.rewrite import Decision, decide
from graph_passes.task_data import check_batches, fit_data, fixed_batch
from graph_passes.unreachable import Findings
from graph_passes.writers import AUTO, FORMS, WRITERS
from moe_spec.errors import UserError, did_you_mean
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a result is to be like; each is an argument of `optimize`."""

    plan: PruningPlan | None = None
    form: str = AUTO
    accepted: Sequence[str] | None = None
    tokens: int | None = None
    precision: Precision = AS_IT_IS
    accepted_precisions: Sequence[str] | None = None
    activations: Activations | None = None

    def __post_init__(self) -> None:
        """Refuse what no model can have.

        Raises:
            UserError: a form or a precision that is unknown, that the target does not take, or that excludes another.
        """
        if self.form != AUTO and self.form not in WRITERS:
            raise UserError(f"unknown form {self.form!r}", hint=did_you_mean(self.form, FORMS))
        if self.form != AUTO and self.accepted is not None and self.form not in self.accepted:
            raise UserError(
                f"the target does not take form {self.form!r}", hint=f"it takes: {', '.join(self.accepted)}"
            )
        self.precision.check_accepted(self.accepted_precisions)
        if self.activations is not None and self.form == "qmoe":
            raise UserError(
                "form qmoe computes with float activations inside its op",
                hint="leave --activations out, or choose another --form",
            )

    @property
    def forms(self) -> Sequence[str] | None:
        """The forms ``accepted`` that remain where activations are int8: a fused op cannot be rounded inside."""
        if self.activations is None or self.accepted is None:
            return self.accepted
        return [name for name in self.accepted if name != "qmoe"]


@dataclasses.dataclass(frozen=True)
class Settled:
    """What happens to a model.

    Attributes:
        model: as it was read; of its graph the rest is quantised, where that is asked for.
        wanted: what was asked for.
        layers: for each block what it loses, planned or unreachable; None where all experts stay.
        findings: for each block what no input can choose, where that decides what goes.
        decisions: for each block what it becomes.
        size: of the graph as it was read.
        rest: what became of the weights outside the MoE layers.
        formats: that floats are cast to; None where nothing is.
        activations: as asked for, with the data as the graph takes them.
    """

    model: Model
    wanted: Wanted
    layers: tuple[LayerPlan | None, ...]
    findings: tuple[Findings | None, ...]
    decisions: tuple[Decision, ...]
    size: Size
    rest: Rest
    formats: Formats | None
    activations: Activations | None

    @property
    def is_new(self) -> bool:
        """Whether the graph becomes another one; else the file is copied as it is."""
        rewritten = any(decision.form is not None for decision in self.decisions)
        return self.model.reduced or bool(self.rest.quantized) or rewritten

    @property
    def quantizations(self) -> tuple[Quantization | None, Quantization | None]:
        """How the experts are quantised, and how the rest is."""
        precision = self.wanted.precision
        return precision.quantization, precision.rest_quantization if self.rest.quantized else None


def settle(model: Model, wanted: Wanted) -> Settled:
    """What happens to ``model`` so that it becomes what is ``wanted``.

    Raises:
        UserError: the plan, the data or the precision does not fit the model, a form cannot express a layer, or the
            config.json beside the model is none.
    """
    read_config(model.path.parent)  # what is left is written into it in the end
    formats, activations = _formats(model, wanted.precision), _fitted(model, wanted.activations)
    planned = match_layers(wanted.plan, model.blocks)
    findings = tuple(found if plan is None else None for found, plan in zip(model.findings, planned, strict=True))
    layers = tuple(plan if found is None else found.plan for plan, found in zip(planned, findings, strict=True))
    decisions = tuple(
        decide(block, layer, wanted.form, wanted.forms, wanted.precision.quantization, wanted.tokens)
        for block, layer in zip(model.blocks, layers, strict=True)
    )
    _check_unrounded(decisions)
    size = measure(model.graph, model.path.parent)
    rest = _quantize_rest(model, wanted.precision)
    return Settled(model, wanted, layers, findings, decisions, size, rest, formats, activations)


def asked_before(model: Model) -> Mapping[str, Any]:
    """The precision that an earlier run was asked for."""
    return ({} if model.manifest is None else model.manifest.details.get("precision")) or {}


def _formats(model: Model, precision: Precision) -> Formats | None:
    """What has to be cast; None where nothing has, or an earlier run did just that.

    Raises:
        UserError: the model is not float32.
    """
    before = asked_before(model)
    if is_float32(model.graph) or not precision.asks_for_floats:
        return precision.formats
    if before and precision.over(before) == Precision().over(before):
        return None
    raise UserError(
        f"{model.path} is of halves already, and casts start from float32",
        hint="optimise the float32 model with --precision and --rest-precision; moe-edge export writes one",
    )


def _fitted(model: Model, activations: Activations | None) -> Activations | None:
    """``activations`` with the data as the graph takes them, in batches as large as it takes.

    Raises:
        UserError: they do not fit.
    """
    if activations is None:
        return None
    inputs, _ = io_of(model.graph)
    size = fixed_batch(inputs) or activations.batch_size
    check_batches(activations.data, inputs, size, str(model.path), "give data of a multiple of {} examples")
    data = fit_data(activations.data, inputs, activations.name)
    return dataclasses.replace(activations, data=data, batch_size=size)


def _check_unrounded(decisions: Sequence[Decision]) -> None:
    """Refuse to write anew what rounds its activations: that would be lost.

    Raises:
        UserError: a layer is such.
    """
    for decision in decisions:
        if decision.form is not None and rounds(nodes_of(decision.read)):
            raise UserError(
                f"layer {decision.read.name} rounds its activations, which would be lost where it is written anew",
                hint="prune, quantise and write the model that had float activations, with --activations int8",
            )


def _quantize_rest(model: Model, precision: Precision) -> Rest:
    """Quantise what is neither router nor expert, if that is asked for; before any block is written anew.

    Raises:
        UserError: nobody knows what the router of a layer is.
    """
    if precision.rest_quantization is None:
        return Rest()
    check_routers_known([*(entry.layer for entry in model.unrecognised), *(entry.name for entry in model.choosing)])
    return quantize_rest(model.graph, model.path.parent, model.blocks, precision.rest_quantization)
