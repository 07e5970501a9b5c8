"""The page: what the template is given, and the HTML that comes of it."""

import base64
import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moe_spec.errors import UserError
from report import plots, words
from report.artifacts import Artifacts, Found
from report.chain import Node, chain
from report.commands import commands, missing
from report.expert_map import MOST_CELLS, ExpertMap, LayerMap, expert_maps, shown
from report.loss_plot import loss_plot
from report.names import Names, called
from report.variants import Variant, cost_keys, distinct, pareto, strays, targets_of
from report.verdict import COSTS, FAILS, GONE, PROVEN, SHIP, UNVERIFIED, WHOLE, Verdict, kind_of, loss_of, whole_of
from report.words import NONE, milliseconds, number, percent, plural, points, short, size, span
from runtime.backend import ENGINE
from runtime.bench_report import BenchReport
from runtime.fit import NO, SOME, UNKNOWN, Fit, targets
from runtime.model_dir import unknown_formats
from runtime.targets import TARGETS, Target
from runtime.verification.report import ParityReport

Row = dict[str, Any]

SECTIONS = (
    ("verdict", "Verdict"),
    ("variants", "Variants"),
    ("experts", "Experts"),
    ("accuracy", "Accuracy"),
    ("cost", "Size and latency"),
    ("parity", "Parity"),
    ("memory", "Memory"),
    ("chain", "Chain"),
    ("commands", "Commands"),
)
"""Of the page, by the ``id`` of each."""

_MARKS = {SHIP: "✓", PROVEN: "✓", COSTS: "!", FAILS: "✗", UNVERIFIED: "?"}
_DECISIONS = {
    SHIP: ("pass", "✓ may ship"),
    COSTS: ("over", "✗ loses too much"),
    FAILS: ("fail", "✗ is wrong"),
    PROVEN: ("none", "loss unknown"),
    UNVERIFIED: ("none", "not verified"),
    WHOLE: ("kind", "baseline"),
}
"""Class and words of a variant's state."""
_MEASURES = {"score": "score", "before": "share before", "after": "share after"}
_TEMPLATES = Path(__file__).parent / "templates"
_FITS = {
    SOME: ("some", "◐ the larger"),
    NO: ("no", "✗ too large"),
    UNKNOWN: ("unknown", "✓ taken"),
}
_MOST_FITS = 8
"""Models beside each other in the table of targets."""


def render(directory: Path, artifacts: Artifacts, variants: Sequence[Variant], verdict: Verdict) -> str:
    """The whole page; ``directory`` is where the artifacts are."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "short": short,
        "percent": percent,
        "number": number,
        "decimals": lambda value: NONE if value is None else f"{value:.6f}",
        "count": lambda value: f"{value:,}",
    }
    style = environment.get_template("style.css").render()
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        name=artifacts.name,
        sections=SECTIONS,
        verdict=verdict,
        marks=_MARKS,
        none_known=NONE,
        tiles=list(_tiles(variants, verdict)),
        loss_chart=loss_plot(variants, verdict) or (None, ""),
        style=Markup(style),  # noqa: S704 - our own files
        script=Markup(script),  # noqa: S704
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=importlib.metadata.version("moe-edge"),
        tools=_tools(artifacts),
        problems=artifacts.problems,
        **_variants(artifacts, variants, verdict),
        **_maps(artifacts, variants),
        **_parity(artifacts, variants),
        **_memory(directory, artifacts, variants, verdict),
        **_provenance(artifacts),
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what may run."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _tools(artifacts: Artifacts) -> str:
    versions = {name: version for model in artifacts.models for name, version in model.value.tools.items()}
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if name != "moe-edge")


def _latency_title(key: tuple[str, int]) -> str:
    phase, batch = key
    return f"{phase} batch {batch}".strip()


def _tiles(variants: Sequence[Variant], verdict: Verdict) -> Iterator[Row]:
    verified = [variant for variant in variants if variant.parity is not None]
    if not verified:
        return
    passed = [variant for variant in verified if variant.parity is not None and variant.parity.passed]
    flips = sum(variant.parity.flips or 0 for variant in verified if variant.parity is not None)
    note = "verified variants, " + (plural(flips, "flip") if flips else "no flips")
    yield {"name": "Proven", "value": f"{len(passed)} of {len(verified)}", "note": note}
    chosen = next((variant for variant in variants if variant.label == verdict.chosen), None)
    if chosen is not None:
        yield from _chosen(chosen, variants, verdict)
        return
    if verdict.baseline is not None:
        low, high = percent(verdict.baseline.low), percent(verdict.baseline.high)
        yield {"name": "Unpruned accuracy", "value": percent(verdict.baseline.value), "note": f"{low} to {high}"}
    pruned = [variant for variant in passed if not variant.unpruned]
    rated = [(variant.accuracy.value, variant) for variant in pruned if variant.accuracy is not None]
    if rated:
        value, best = max(rated, key=lambda pair: pair[0])
        loss = loss_of(best, variants)
        lost = "" if loss is None else f", {points(-loss)} points"
        yield {"name": f"Best {kind_of([best])}", "value": percent(value), "note": f"{best.label}{lost}"}
    if pruned:
        least = min(pruned, key=lambda variant: variant.rank)
        said = ", ".join([least.label, *_share_of_whole(least, variants)])
        yield {"name": "Smallest proven", "value": size(least.file_bytes), "note": said}


def _share_of_whole(variant: Variant, variants: Sequence[Variant]) -> list[str]:
    """Its size beside that of the model with all experts; nothing where that is not known."""
    whole = whole_of(variant, variants)
    return [] if whole is None else [f"{percent(variant.file_bytes / whole.file_bytes, 0)} of the unpruned"]


def _chosen(chosen: Variant, variants: Sequence[Variant], verdict: Verdict) -> Iterator[Row]:
    """What the one that may ship gains over the unpruned model, and what it gives for that."""
    accuracy, loss, whole = chosen.accuracy, loss_of(chosen, variants), whole_of(chosen, variants)
    if accuracy is not None and loss is not None and verdict.baseline is not None:
        lost = f"{points(-loss)} points, unpruned {percent(verdict.baseline.value)}"
        yield {"name": "Accuracy", "value": percent(accuracy.value), "note": lost}
    yield {"name": "Size", "value": size(chosen.file_bytes), "note": "".join(_share_of_whole(chosen, variants))}
    for key in cost_keys([chosen])[:1]:
        took = chosen.latency(key)
        before = None if whole is None else whole.latency(key)
        note = "" if not before or not took else f"{percent(took / before, 0)} of the unpruned"
        yield {"name": f"Latency, {_latency_title(key)}", "value": milliseconds(took), "note": note}


def _variants(artifacts: Artifacts, variants: Sequence[Variant], verdict: Verdict) -> Row:
    keys = cost_keys(variants)
    by_size = _front(variants, [variant.file_bytes for variant in variants])
    by_latency = [_front(variants, [variant.latency(key) for variant in variants]) for key in keys]
    charts = [(plots.size_plot(variants), "Bytes of graph and weights.")]
    charts += [
        (plots.latency_plot(variants, key), f"Median latency, {_latency_title(key)}, as bench.json says.")
        for key in keys
    ]
    return {
        "variants": [_row(variant, variants, keys, verdict, [by_size, *by_latency]) for variant in variants],
        "latency_columns": [f"#{_latency_title(key)}" for key in keys],
        "rivals": _rivals(artifacts, keys),
        "machines": list(dict.fromkeys(_machine(bench.value) for bench in artifacts.benches if bench.value.machine)),
        "accuracy_chart": plots.accuracy_plot(variants),
        "cost_charts": [(chart, caption) for chart, caption in charts if chart is not None],
    }


def _rivals(artifacts: Artifacts, keys: Sequence[tuple[str, int]]) -> list[Row]:
    """What was timed beside the variants and is none: torch, or a model that is not in the directory."""
    there = {model.sha256 for model in artifacts.models}
    rows = [
        row for bench in artifacts.benches for row in bench.value.rows if bench.value.models.get(row.model) not in there
    ]
    times = {(row.model, row.phase, row.batch_size): row.median_ms for row in rows}
    return [
        {"label": name, "latencies": [milliseconds(times.get((name, *key))) for key in keys]}
        for name in dict.fromkeys(row.model for row in rows)
    ]


def _machine(bench: BenchReport) -> str:
    threads = plural(bench.threads, "thread") if bench.threads else "a thread for each core"
    return f"{bench.machine}; {threads}"


def _front(variants: Sequence[Variant], costs: Sequence[float | None]) -> set[str]:
    """Paths of the variants that no other beats."""
    return pareto(
        {
            variant.model.path: (cost, variant.accuracy.value)
            for variant, cost in zip(variants, costs, strict=True)
            if variant.accuracy is not None and cost is not None
        }
    )


def _row(
    variant: Variant,
    variants: Sequence[Variant],
    keys: Sequence[tuple[str, int]],
    verdict: Verdict,
    fronts: Sequence[set[str]],
) -> Row:
    accuracy, report, loss = variant.accuracy, variant.parity, loss_of(variant, variants)
    oracle = variant.model.value.details.get("oracle")
    errors = [entry["max_rel"] for entry in oracle if isinstance(entry, dict)] if isinstance(oracle, list) else []
    costs = [size(variant.file_bytes), *(milliseconds(variant.latency(key)) for key in keys)]
    memory = [row.memory_bytes for row in variant.cost if row.memory_bytes is not None]
    return {
        "label": variant.label,
        "first": variant in distinct(variants),
        "decision": _DECISIONS[verdict.decisions[variant.label]],
        "criterion": variant.criterion,
        "experts": span([block.experts for block in variant.blocks]),
        "top_k": span([block.top_k for block in variant.blocks]),
        "form": "+".join(variant.forms),
        "accuracy": percent(None if accuracy is None else accuracy.value),
        "interval": accuracy and f"{100 * accuracy.low:.1f}–{percent(accuracy.high)}",
        "points": points(None if loss is None else -loss),
        "report": report,
        "flips": "flips not seen" if report is None or report.flips is None else plural(report.flips, "flip"),
        "proof": number(max(errors, default=None)),
        "memory": size(max(memory, default=None)),
        "engines": len(variant.engines),
        "engine_targets": [name for engine in variant.engines for name in targets_of(engine.value)],
        "costs": [(text, variant.model.path in front) for text, front in zip(costs, fronts, strict=True)],
    }


def _maps(artifacts: Artifacts, variants: Sequence[Variant]) -> Row:
    found = expert_maps(artifacts, variants)
    on_page = shown(found)
    known = [name for name in _MEASURES if any(name in one.has for one in on_page)]
    return {
        "maps": [_map(one) for one in on_page],
        "measures": [(name, _MEASURES[name]) for name in known] or [("score", "score")],
        "maps_left_out": len(found) - len(on_page),
        "most_cells": f"{MOST_CELLS:,}",
        "has_usage_before": any("before" in one.has for one in on_page),
    }


def _map(one: ExpertMap) -> Row:
    widths = {8: "small", 16: "small wide", 64: "large e64", 160: "large e128"}
    return {
        "label": one.label,
        "criterion": one.criterion,
        "kept": one.kept,
        "cells": one.cells,
        "experts": one.experts,
        "width": next((name for most, name in widths.items() if one.experts <= most), "large e512"),
        "names": ", ".join(_MEASURES[name] for name in one.has),
        "layers": [
            {"name": layer.name, "short": short_name, "cells": list(_cells(one, layer))}
            for layer, short_name in zip(one.layers, words.distinct([layer.name for layer in one.layers]), strict=True)
        ],
    }


def _cells(one: ExpertMap, layer: LayerMap) -> Iterator[Row]:
    texts = {
        "score": [words.score(score) for score in layer.scores],
        "before": [percent(share) for share in layer.before],
        "after": [percent(share) for share in layer.after],
    }
    shades = layer.shades()
    for expert, kept in enumerate(layer.kept):
        here = {name: values[expert] for name, values in texts.items() if values}
        classes = ["k" if kept else "d", *(f"{name[0]}{shades[name][expert]}" for name in here)]
        says = "; ".join(["kept" if kept else "dropped", *(here.get(name, NONE) for name in one.has)])
        texts_shown = [(name[0], text) for name, text in here.items()] if one.experts <= 16 else []
        yield {"classes": " ".join(classes), "texts": texts_shown, "says": says}


def _parity(artifacts: Artifacts, variants: Sequence[Variant]) -> Row:
    named = [(_called(variant, found), found) for variant in variants for found in variant.parities]
    named += [(path or f"{found.path}, {GONE}", found) for path, found in strays(artifacts, variants)]
    rows = [_report(label, found.value, called(artifacts, found.value.reference_sha256)) for label, found in named]
    for row in rows:
        row["open"] = not row["report"].passed or len(rows) == 1
    return {"parities": rows, "error_chart": plots.error_plot(variants)}


def _called(variant: Variant, found: Found[ParityReport]) -> str:
    return variant.label + (f" ({found.path})" if len(variant.parities) > 1 else "")


def _report(label: str, report: ParityReport, reference: str) -> Row:
    routed = [layer for layer in report.layers or () if layer.margin_tokens]
    judged = report.precision if report.precision.startswith("as ") else f"as {report.precision}"
    seen = "flips not observable" if report.flips is None else plural(report.flips, "flip")
    notes = [*report.notes]
    if report.greedy is not None:
        notes.append(f"Greedy decoding: {report.greedy.says}.")
    if report.accuracy is not None:
        change = " to ".join(map(points, (report.accuracy.low, report.accuracy.high)))
        notes.append(f"Accuracy against the reference changes by {change} points, with 95 % confidence.")
    return {
        "label": label,
        "report": report,
        "summary": f"{report.examples:,} examples of {report.data}, beside {reference}, judged {judged}, {seen}",
        "chart": plots.margin_plot(routed, report.tolerance.margin, label) if routed else None,
        "outputs": report.telling_outputs,
        "notes": notes,
    }


def _memory(directory: Path, artifacts: Artifacts, variants: Sequence[Variant], verdict: Verdict) -> Row:
    graphs = [variant for variant in variants if variant.model.value.kind != ENGINE]
    measured = [variant for variant in graphs if variant.parity is not None] or graphs
    engine_parents = [variant for variant in graphs if variant.engines and variant not in measured]
    asked = [*measured, *engine_parents]
    taken = sorted(asked, key=lambda variant: variant.label != verdict.chosen)[:_MOST_FITS]
    paths = {variant.label: directory / variant.model.path for variant in asked if variant in taken}
    fits = {label: found for label, path in paths.items() if (found := _fits(path))}
    devices = {
        target.name: (target.gigabytes[0] * 10**9, target.gigabytes[1] * 10**9)
        for target in TARGETS
        if target.gigabytes is not None
    }
    first = {label: next(iter(found.values())) for label, found in fits.items()}
    rows = [_fit_row(target, {paths[label]: found[target.name] for label, found in fits.items()}) for target in TARGETS]
    return {
        "fits": rows if fits else [],
        "fit_labels": list(fits),
        "fits_left_out": plural(len(asked) - len(taken), "model") if len(asked) > len(taken) else "",
        "memory_chart": plots.memory_plot(first, devices),
        "engines": list(_engines(directory, artifacts)),
    }


def _fits(model: Path) -> dict[str, Fit]:
    """By target; nothing where the files of the model are not at hand."""
    try:
        return {fit.target: fit for fit in targets(model)}
    except (UserError, OSError):
        return {}


def _fit_row(target: Target, fits: Mapping[Path, Fit]) -> Row:
    """A row of the table; ``fits`` by the directory of the model."""
    memory = next((fit.memory for fit in fits.values() if fit.memory is not None), None)
    return {
        "target": target.name,
        "memory": NONE if memory is None else f"{span([end / 10**9 for end in memory])} GB",
        "cells": [_fit_cell(fit, model, target) for model, fit in fits.items()],
    }


def _fit_cell(fit: Fit, model: Path, target: Target) -> Row:
    state, says = _FITS.get(fit.fits, ("yes", "✓ fits"))
    if fit.why_not:  # a form can be written anew, numbers that are rounded stay so
        state, says = ("no", "✗ not as it is") if unknown_formats(model, target) else ("form", "↻ another form")
    why = "; ".join(fit.why_not) or f"needs {size(fit.needs)} or more"
    return {"state": state, "says": says, "why": why}


def _engines(directory: Path, artifacts: Artifacts) -> Iterator[Row]:
    for model in artifacts.models:
        for fit in _fits(directory / model.path).values() if model.value.kind == ENGINE else ():
            yield {
                "path": model.path,
                "target": fit.target,
                "file": size(fit.weights),
                "activations": size(fit.activations),
                "needs": size(fit.needs),
                "fits": "memory not known" if fit.fits == UNKNOWN else fit.fits,
            }


def _provenance(artifacts: Artifacts) -> Row:
    roots = chain(artifacts)
    nodes = list(_flat(roots))
    damaged = len(artifacts.damages)
    files = sum(len(model.value.files) for model in artifacts.models)
    says = (
        f"{plural(damaged, 'model')} has files that its manifest does not describe."
        if damaged
        else f"Every child names the hash of its parent. {plural(files, 'file')} were read; all are as manifests say."
    )
    steps = commands(artifacts)
    made = {step.makes for step in steps}
    given = {found.path: found.sha256 for found in artifacts.checkpoints if found.path not in made}
    return {
        "roots": roots,
        "nodes": nodes,
        "chain_says": says,
        "steps": [
            (note, [step.command for step in group])
            for note, group in itertools.groupby(steps, key=lambda step: step.note)
        ],
        "outside": {**given, **Names(artifacts).outside},
        "missing": missing(artifacts),
    }


def _flat(nodes: Sequence[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        yield from _flat(node.children)
