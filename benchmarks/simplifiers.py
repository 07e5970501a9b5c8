"""What simplifiers remove of a MoE layer most of whose experts can never be chosen, and what `optimize` removes.

    python -m benchmarks.simplifiers > benchmarks/simplifiers.md

Three of the simplifiers come with ``pip install "moe-edge[bench]"``; without them their columns say so. With
``--quick`` it takes a few graphs.
"""

import argparse
import contextlib
import dataclasses
import inspect
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from benchmarks.markdown import table
from benchmarks.masked import FORMS, MASKED, MaskedGraph
from benchmarks.masked.block import Block
from benchmarks.masked.constants import EXPERTS, HIDDEN, TOP_K
from benchmarks.masked.routers import BEHIND, WHY
from benchmarks.simplifier_tools import RUNNER, TOOLS, Tool
from graph_passes.proof.compare import TOLERANCE
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL
from moe_spec.runner import Arrays, error_between
from runtime.measuring.machine import describe_machine

INSTALL = 'pip install "moe-edge[bench]"'
QUICK = ("stacked.add", "if.constant_if", "batched_mm.finite", "stacked.unmasked")
TOKENS = (1, 5, 64)

NOT_INSTALLED, REFUSED, FAILED = "not installed", "refused", "failed"
NOT_LOADABLE, WRONG = "**does not load**", "**wrong**"
NO_PLAN = "-"
"""A plan drops experts before they are ranked: where the mask stands behind the router, that is another function."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a tool made of a graph.

    Attributes:
        removed: parameters that its file has less than the original; None where there is no file.
        difference: largest difference between the outputs, relative to the original's largest magnitude.
        problem: why there is no file, or why the file is worth nothing; empty where all is well.
        details: the tool's own words about it.
    """

    removed: int | None
    difference: float = 0.0
    problem: str = ""
    details: str = ""

    @property
    def gain(self) -> int:
        """Parameters removed by a file that can be used; 0 where there is none."""
        return 0 if self.problem or self.removed is None else self.removed

    def __str__(self) -> str:
        number = "" if self.removed is None else f"{self.removed:,}"
        return f"{number} {self.problem}".strip()


@dataclasses.dataclass(frozen=True)
class Row:
    """One graph: how many parameters could go, and what each tool, by name, made of it."""

    graph: MaskedGraph
    ideal: int
    outcomes: Mapping[str, Outcome]


def measure(names: Sequence[str], tools: Sequence[Tool] = TOOLS) -> list[Row]:
    """Give the graphs to all tools; progress goes to stderr, and so does what tools print."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        for name in names:
            print(name, file=sys.stderr)
            graph, source = MASKED[name], Path(scratch) / f"{name}.onnx"
            onnx.save(graph(), source)
            before, here = RUNNER.run(source, _feeds()), source.with_suffix("")
            here.mkdir()
            outcomes = {tool.name: _apply(tool, graph, source, here / tool.name, before) for tool in tools}
            rows.append(Row(graph, parameters(source) - graph.needed, outcomes))
    return rows


def _apply(tool: Tool, graph: MaskedGraph, source: Path, out: Path, before: Sequence[Arrays]) -> Outcome:
    if tool.version is None:
        return Outcome(None, problem=NOT_INSTALLED)
    if tool.told and graph.mask in BEHIND:
        return Outcome(None, problem=NO_PLAN)
    try:
        tool.run(source, out)
    except UserError as error:
        return Outcome(None, problem=REFUSED, details=_first_reason(error.what.removeprefix(f"{source}: ")))
    except Exception as error:  # each tool has errors of its own
        return Outcome(None, problem=FAILED, details=f"{type(error).__name__}: {error}")
    removed = parameters(source) - parameters(out / MODEL)
    try:
        after = RUNNER.run(out / MODEL, _feeds(), ["out"])
    except UserError as error:
        return Outcome(removed, math.inf, NOT_LOADABLE, error.what.replace(f"{out}/", ""))
    difference = max(error_between(old["out"], new["out"])[1] for old, new in zip(before, after, strict=True))
    return Outcome(removed, difference, "" if difference <= TOLERANCE["float32"] else WRONG)


def _first_reason(refusal: str) -> str:
    """The layer and what the reader that came furthest said; `moe-edge inspect` shows what all the others did."""
    return "\n".join(refusal.splitlines()[:3])


def _feeds() -> list[Arrays]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((count, HIDDEN), dtype=np.float32)} for count in TOKENS]


def parameters(path: Path) -> int:
    """Elements of every weight that the file holds, read or not: tensors larger than one hidden state."""
    model = onnx.load(path, load_external_data=False)
    in_functions = [tensor for function in model.functions for tensor in _in_nodes(function.node)]
    tensors = [*_in_graph(model.graph), *in_functions]
    sizes = [math.prod(tensor.dims) for tensor in tensors]
    return sum(size for size in sizes if size > HIDDEN)


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes, and those of subgraphs."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from _in_graph(attribute.g)


def report(rows: Sequence[Row], command: str, tools: Sequence[Tool] = TOOLS) -> str:
    """The whole document."""
    masks = dict.fromkeys(row.graph.mask for row in rows)
    forms = dict.fromkeys(row.graph.form for row in rows)
    return f"""# What is removed of experts that can never be chosen

`{command}` printed this on {describe_machine()}.

Each graph is one MoE layer of {EXPERTS} experts with random weights (H={HIDDEN}, K={TOP_K}, float32), of which most can
never be chosen; `benchmarks/masked` has them by form and mask. A number is how many parameters the tool's file has less
than the original, counted in the file whether or not anything reads them. *ideal* is the experts out of reach and their
rows of the router. Outputs are compared on random inputs of {", ".join(map(str, TOKENS))} tokens; a file that computes
something else (by more than {TOLERANCE["float32"]:.0e} of the output's range) is {WRONG}. A plan drops
experts before they are ranked; where the mask stands behind the router that is another function: {NO_PLAN}.

{table(("graph", "ideal", *(tool.name for tool in tools)), (_cells(row, tools) for row in rows))}

{summarize(rows, tools)}

{table(TOOL_HEAD, (_tool_cells(rows, tool) for tool in tools), left=3)}

{table(("form", "how the experts are written"), ((form, _first_line(FORMS[form])) for form in forms), left=2)}

{table(("mask", "what keeps experts out of reach"), ((mask, WHY[mask]) for mask in masks), left=2)}{_troubles(rows)}"""


def _first_line(function: Callable[[Block], str]) -> str:
    """The first line of its docstring says what a form is."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _cells(row: Row, tools: Sequence[Tool]) -> list[str]:
    return [row.graph.name, f"{row.ideal:,}", *(str(row.outcomes[tool.name]) for tool in tools)]


TOOL_HEAD = ("tool", "version", "what is called", "graphs made smaller", "of the ideal", "largest difference")


def _tool_cells(rows: Sequence[Row], tool: Tool) -> list[str]:
    """One line of the table of tools, over the graphs in which something could go."""
    if tool.version is None:
        return [tool.name, f"{NOT_INSTALLED}: `{INSTALL}`", tool.call, "-", "-", "-"]
    asked = [row for row in rows if row.ideal and row.outcomes[tool.name].problem != NO_PLAN]
    gains = [row.outcomes[tool.name].gain for row in asked]
    smaller = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    share = f"{sum(gains) / sum(row.ideal for row in asked):.0%}" if asked else "-"
    differences = [row.outcomes[tool.name].difference for row in rows if row.outcomes[tool.name].removed is not None]
    worst = f"{max(differences):.0e}" if differences else "-"
    return [tool.name, tool.version, tool.call, smaller, share, worst]


def summarize(rows: Sequence[Row], tools: Sequence[Tool]) -> str:
    """What the numbers say, a sentence a line."""
    dead = [row for row in rows if row.ideal]
    theirs = [tool.name for tool in tools if not tool.ours and tool.version is not None]
    touched = [row.graph.name for row in dead if any(row.outcomes[name].gain > 0 for name in theirs)]
    missing = [tool.name for tool in tools if tool.version is None]
    exceptions = f" (they did in {', '.join(touched)})" if touched else ""
    lines = [
        f"In {len(dead) - len(touched)} of {len(dead)} graphs with experts out of reach, none of the {len(theirs)} "
        f"simplifiers that ran removed a parameter{exceptions}.",
        *(_ours(dead, tool) for tool in tools if tool.ours),
        _controls([row for row in rows if not row.ideal]),
        _unusable(rows),
        f"Not installed, so not run: {', '.join(missing)}. `{INSTALL}` brings them." if missing else "",
    ]
    return "\n".join(line for line in lines if line)


def _ours(dead: Sequence[Row], tool: Tool) -> str:
    pairs = [(row.outcomes[tool.name], row.ideal) for row in dead]
    asked = [(outcome, ideal) for outcome, ideal in pairs if outcome.problem != NO_PLAN]
    whole = sum(outcome.gain >= ideal for outcome, ideal in asked)
    part = sum(0 < outcome.gain < ideal for outcome, ideal in asked)
    refused = sum(outcome.problem == REFUSED for outcome, _ in asked)
    return (
        f"Of {len(asked)} that were given to {tool.name}, it removed all that could go from {whole} and a part from "
        f"{part}, refused {refused}, and removed nothing from {len(asked) - whole - part - refused}."
    )


def _controls(controls: Sequence[Row]) -> str:
    names = ", ".join(row.graph.name for row in controls)
    found = [f"{tool} in {row.graph.name}" for row in controls for tool, it in row.outcomes.items() if it.gain > 0]
    what = f"parameters went all the same: {', '.join(found)}" if found else "nobody removed a parameter"
    return f"Where every expert can be chosen ({names}), {what}." if controls else ""


def _unusable(rows: Sequence[Row]) -> str:
    outcomes = [(f"{tool}, {row.graph.name}", it) for row in rows for tool, it in row.outcomes.items()]
    written = [(where, outcome) for where, outcome in outcomes if outcome.removed is not None]
    bad = [f"{where} ({outcome.problem})" for where, outcome in written if outcome.problem]
    if bad:
        return f"Of {len(written)} files that were written, {len(bad)} cannot be used: {'; '.join(bad)}."
    return f"All {len(written)} files that were written load in ONNX Runtime and compute what the originals do."


def _troubles(rows: Sequence[Row]) -> str:
    """What the tools said where they gave nothing, once for all that said the same."""
    graphs: dict[str, list[str]] = {}
    for row in rows:
        tools: dict[str, list[str]] = {}
        for tool, outcome in row.outcomes.items():
            if outcome.details:
                tools.setdefault(f"{outcome.problem}: {' '.join(outcome.details.split())}", []).append(tool)
        for words, names in tools.items():
            graphs.setdefault(f"{', '.join(names)}: {words}", []).append(row.graph.name)
    lines = [f"- {words} ({', '.join(names)})" for words, names in graphs.items()]
    return "\n\nWhat the tools said where there is no number:\n\n" + "\n".join(lines) if lines else ""


def main() -> None:
    """Measure and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few graphs only")
    quick = parser.parse_args().quick
    rows = measure(QUICK if quick else tuple(MASKED))
    print(report(rows, f"python -m benchmarks.simplifiers{' --quick' if quick else ''}"))


if __name__ == "__main__":
    main()
