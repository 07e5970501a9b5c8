"""Say what each target takes; or which take a model, and whether it fits their memory.

A target is a device and what builds for it: rtx-ada is an RTX 40 with TensorRT-RTX, jetson-orin a Jetson with TensorRT.
The table has the number formats and the forms that each takes; a form is how the experts of a layer are written in
ONNX (`moe-edge optimize --form`). Plugins of TensorRT-Edge-LLM build from a pruned checkpoint (`moe-edge plan
--target`).

With a model: what it takes of a device's memory at the largest shapes, for weights, a decoder's cache, inputs and
outputs, and what the build takes, three times the weights, which on a Jetson and a DGX Spark is the device's memory
too. Activations are known of an engine only: TensorRT tells them when it has built it.

Example: moe-edge targets
Example: moe-edge targets optimized/
Example: moe-edge targets optimized/ --target jetson-orin --memory 8 --maxShapes=pixel_values:64x1x28x28
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.box
import typer
from rich.table import Table
from rich.text import Text

from cli import console
from cli.options import AsJson
from moe_spec.errors import UserError
from moe_spec.formats import FORMATS

if TYPE_CHECKING:
    from runtime.fit import Fit
    from runtime.targets import Plugin, Target

NEEDS = "needs {needs}: {weights} of weights, {cache} of cache, {tensors} of inputs and outputs, {activations}"


def targets(
    model: Annotated[
        Path | None, typer.Argument(help="Model directory or engine; the table of all targets without it.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this one.")] = None,
    max_shapes: Annotated[
        str | None,
        typer.Option(
            "--maxShapes", metavar="SHAPES", help="Largest shapes: NAME:DIMxDIM,... By default those of build."
        ),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB of memory that your device has; by default what its makers say.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the table of targets, or what they say to a model."""
    if model is None:
        if memory is not None or max_shapes is not None:
            asked = "--memory" if max_shapes is None else "--maxShapes"
            raise UserError(f"{asked} is about a model, but there is none", hint=f"moe-edge targets MODEL {asked} ...")
        _show_table(target or [], as_json)
        return
    from runtime.fit import GIGABYTE
    from runtime.fit import targets as fits_of
    from runtime.profiles import fixed_profile

    if memory is not None and not math.isfinite(memory):
        raise UserError(f"--memory is {memory}, expected a number of GB", hint="leave it out for what the makers say")
    profiles = [] if max_shapes is None else [fixed_profile("--maxShapes", max_shapes)]
    rows = fits_of(model, target or [], profiles, None if memory is None else int(memory * GIGABYTE))
    taken = [row.target for row in rows if not row.why_not]
    console.result(
        f"{model}: {len(taken)} of {len(rows)} targets take it; {_needs(rows[0])}",
        {row.target: _fit_json(row) for row in rows},
        as_json,
    )
    if not as_json:
        console.out.print(_fit_table(rows))
        for row in rows:
            for reason in row.why_not:
                console.out.print(f"{row.target}: {reason}", markup=False, soft_wrap=True)


def _show_table(names: Sequence[str], as_json: bool) -> None:
    from runtime.targets import PLUGINS, TARGETS, find_target

    rows = [find_target(name) for name in names] or list(TARGETS)
    plugins = () if names else PLUGINS
    payload = {row.name: dataclasses.asdict(row) | {"precisions": sorted(row.precisions)} for row in rows}
    payload |= {plugin.kernels.target: dataclasses.asdict(plugin) for plugin in plugins}
    console.result(
        f"{len(rows)} targets of graphs, {len(plugins)} of checkpoints (TensorRT-Edge-LLM's plugins)", payload, as_json
    )
    if not as_json:
        console.out.print()
        console.out.print(_table(rows))
        if plugins:
            console.out.print("Targets of `moe-edge plan`:\n")
            console.out.print(_plugins(plugins))


def _table(rows: Sequence["Target"]) -> Table:
    return _listed((row.name, _about(row)) for row in rows)


def _about(row: "Target") -> Iterator[str]:
    """What builds for it and what it is, then what it takes."""
    on = () if row.compute_capability is None else (f"compute capability {row.compute_capability}",)
    has = () if row.gigabytes is None else (f"{_span(row.gigabytes)} GB",)
    yield ", ".join((f"{row.backend} {row.versions}", *on, *has))
    yield row.note
    yield f"formats: {' '.join(short for short, name in FORMATS.items() if name in row.precisions)}"
    yield f"forms: {' '.join(row.forms)}"


def _plugins(rows: Sequence["Plugin"]) -> Table:
    return _listed((row.kernels.target, _about_plugin(row)) for row in rows)


def _about_plugin(row: "Plugin") -> Iterator[str]:
    yield f"{row.name}, compute capability {' '.join(row.capabilities) or 'not stated'}"
    yield row.note
    counts, top_k = " or ".join(map(str, row.kernels.counts)), row.kernels.max_top_k
    yield f"experts: {counts or 'any number'}; K: {'any' if top_k is None else f'to {top_k}'}"


def _listed(rows: Iterable[tuple[str, Iterable[str]]]) -> Table:
    """A name and lines about it, on terminals of any width."""
    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in rows:
        table.add_row(Text(name, "bold"), Text("\n".join(filter(None, lines))))
    return table


def _needs(row: "Fit") -> str:
    """What running and building take, which is the same on every target."""
    known = row.activations is not None
    sizes = {name: _size(getattr(row, name)) for name in ("weights", "cache", "tensors")}
    activations = f"{_size(row.activations)} of activations" if known else "and activations, which its engine will tell"
    needs = NEEDS.format(needs=f"{'' if known else 'over '}{_size(row.needs)}", activations=activations, **sizes)
    return f"{needs}; building takes {_size(row.build)}" if row.build else needs


def _fit_table(rows: Sequence["Fit"]) -> Table:
    from runtime.fit import NO, SOME, UNKNOWN, YES

    builds = {YES: "fits", SOME: "with swap on the smaller", NO: "needs swap", UNKNOWN: "-"}
    table = Table(box=rich.box.SIMPLE)
    for column in ("target", "takes it", "GB", "fits"):
        table.add_column(column, no_wrap=True)
    table.add_column("build there")
    for row in rows:
        table.add_row(
            row.target,
            "no" if row.why_not else "yes",
            _span(None if row.memory is None else [size / 10**9 for size in row.memory]),
            "?" if row.fits == UNKNOWN else row.fits,
            builds[row.builds],
        )
    return table


def _span(numbers: Sequence[float] | None) -> str:
    if numbers is None:
        return "-"
    return " to ".join(dict.fromkeys(f"{number:g}" for number in numbers))


def _size(count: int | None) -> str:
    """Bytes as people say them.

    >>> _size(None), _size(0), _size(8544), _size(1_200_000_000)
    ('?', '0', '8.5 KB', '1.2 GB')
    """
    if count is None:
        return "?"
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def _fit_json(row: "Fit") -> Mapping[str, Any]:
    return dataclasses.asdict(row) | {"needs": row.needs, "fits": row.fits, "builds": row.builds}
