"""One computation of all experts on sorted rows, each on its own run: ``Concat(f_e(run e of whole))``."""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import is_weight, produced_by, producer, source
from graph_passes.readers.parts.projection import Linear, read_linear
from graph_passes.readers.parts.single_expert import ExpertParts, read_ffn
from graph_passes.readers.trial.gathered import gather_of
from graph_passes.readers.trial.interpreter import Interpreter
from graph_passes.readers.trial.trial import Trial, numbered, rows_of
from graph_passes.record.block import FormError
from graph_passes.routers import Weights
from graph_passes.weights.weight import Array, Weight

TAKES = ("Gather", "GatherND", "Slice", "Split")
"""Ops that may take a run of rows; their second input says where it is, and is no constant."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """``concat = Concat(output_e)``, where ``output_e`` is computed of a run of ``whole``.

    Attributes:
        whole: (T K, in) all rows.
        inputs: in.
        branches: (run, output), one an expert, in the order of the Concat.
        concat: gives (T K, out).
        outputs: out.
        linears: what each branch is, where it is one projection.
        bias: (E, out) added afterwards, and its rows as they are gathered, where there is one.
        passed: the run of ``whole`` that no branch computes, behind their outputs in the Concat.
    """

    whole: gs.Tensor
    inputs: int
    branches: tuple[tuple[gs.Tensor, gs.Tensor], ...]
    concat: gs.Node
    outputs: int
    linears: tuple[Linear, ...] = ()
    bias: tuple[gs.Tensor, gs.Tensor, Weight] | None = None
    passed: gs.Tensor | None = None

    def linear(self, expert: int, branch: int) -> Linear:
        """The projection of ``expert``, which is ``branch``."""
        linear = self.linears[branch]
        return linear if self.bias is None else dataclasses.replace(linear, bias=self.bias[2].one(expert))

    def order(self, slots: Array, trial: Trial, run: Interpreter) -> list[int]:
        """For each expert the number of its branch; ``slots`` (T K,) says whose the rows are.

        Raises:
            FormError: a branch reads other rows than those of one expert, or the Concat puts them elsewhere.
        """
        table, found = numbered(len(slots), 1), []  # rows are taken whole: one channel shows which
        run.give(self.whole, table)
        wanted = np.zeros((len(slots), 1))
        for taken, output in self.branches:
            node = producer(taken)
            rows = rows_of(run.of(taken), table, node)
            found.append(trial.expert_of(slots[rows], node))
            wanted[rows] = trial.outputs(len(rows), 1)
            run.give(output, wanted[rows])
        trial.require_all(found, self.concat)
        if self.passed is not None:
            rows = rows_of(run.of(self.passed), table, producer(self.passed))
            trial.require_silent(slots[rows], self.concat)
            wanted[rows] = table[rows]
        if not np.array_equal(run.of(self.concat.outputs[0]), wanted):
            raise FormError("the experts' outputs do not stand in the order of the rows", self.concat)
        self._check_bias(slots, trial, run)
        return [found.index(expert) for expert in trial.ids_of_experts]

    def _check_bias(self, slots: Array, trial: Trial, run: Interpreter) -> None:
        if self.bias is None:
            return
        stored, gathered, weight = self.bias
        table = numbered(weight.shape[0], 1)
        run.give(stored, table)
        rows = rows_of(run.of(gathered), table, producer(gathered))
        if not np.array_equal(rows, trial.ids_TK.reshape(-1)[slots]):
            raise FormError("biases are gathered by other ids than those of the rows", producer(gathered))


def run_of(tensor: gs.Tensor) -> gs.Tensor | None:
    """All rows, of which ``tensor`` is a run between places that are computed."""
    node = produced_by(tensor, *TAKES)
    if node is None or len(node.inputs) < 2 or node.attrs.get("axis", 0) != 0:
        return None
    return node.inputs[0] if all(isinstance(value, gs.Variable) for value in node.inputs[:2]) else None


def read_ffns(concat: gs.Node, weights: Weights) -> tuple[Layer, tuple[ExpertParts, ...]] | None:
    """Whole FFNs, one a branch of ``concat``; None where a branch is one projection.

    Raises:
        FormError: neither.
    """
    if run_of(read_linear(concat.inputs[0], weights).x) is not None:
        return None
    last = concat.inputs[-1]
    passed = None if run_of(last) is None else last
    outputs = concat.inputs if passed is None else concat.inputs[:-1]
    ffns = [read_ffn(output, weights) for output in outputs]
    whole = _whole([*(x for x, _ in ffns), *([] if passed is None else [passed])], concat)
    branches = tuple((x, output) for (x, _), output in zip(ffns, outputs, strict=True))
    first = ffns[0][1]
    layer = Layer(whole, first.up.weight.shape[0], branches, concat, first.down.weight.shape[1], passed=passed)
    return layer, tuple(parts for _, parts in ffns)


def read_projection(tensor: gs.Tensor, weights: Weights) -> Layer:
    """The projection of all rows that gives ``tensor``, a gathered bias added or not.

    Raises:
        FormError: it is none.
    """
    tensor, bias = _strip_bias(source(tensor), weights)
    concat = produced_by(source(tensor), "Concat")
    if concat is None:
        raise FormError("the projections of the experts are not put behind one another", producer(tensor) or tensor)
    linears = tuple(read_linear(output, weights) for output in concat.inputs)
    whole = _whole([linear.x for linear in linears], concat)
    branches = tuple((linear.x, output) for linear, output in zip(linears, concat.inputs, strict=True))
    inputs, outputs = linears[0].weight.shape
    return Layer(whole, inputs, branches, concat, outputs, linears, bias)


def _whole(runs: list[gs.Tensor], concat: gs.Node) -> gs.Tensor:
    """What all of ``runs`` are taken from."""
    wholes = [run_of(run) for run in runs]
    if wholes[0] is None or any(whole is not wholes[0] for whole in wholes):
        raise FormError("the branches do not take runs of the same rows", concat)
    return wholes[0]


def _strip_bias(tensor: gs.Tensor, weights: Weights) -> tuple[gs.Tensor, tuple[gs.Tensor, gs.Tensor, Weight] | None]:
    node = produced_by(tensor, "Add")
    if node is None:
        return tensor, None
    for rows, other in (node.inputs, reversed(node.inputs)):
        pick = gather_of(rows)
        if pick is not None and is_weight(pick.inputs[0], 2):
            return other, (pick.inputs[0], rows, weights.of(pick.inputs[0]))
    raise FormError("a projection adds something else than a gathered bias", node)
