"""The charts of the page: what each shows, as Vega-Lite says it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from report.charts import POINT, SAYS, SILENT, Spec, both, log_ticks, series
from report.variants import UNPRUNED, Accuracy, Variant, distinct, pareto
from report.words import milliseconds, number, percent, plural, size
from runtime.fit import Fit
from runtime.verification.report import MARGIN_EDGES, LayerParity, OutputParity

_MOST_LABELS = 8


_ACCURACY: Spec = {
    "field": "accuracy",
    "type": "quantitative",
    "title": "accuracy",
    "axis": {"format": ".0%", "tickCount": 6},
    "scale": {"zero": False, "padding": 12},
}


def _measured(variants: Sequence[Variant]) -> list[tuple[Variant, Accuracy]]:
    return [(variant, variant.accuracy) for variant in variants if variant.accuracy is not None]


def accuracy_plot(variants: Sequence[Variant]) -> Markup | None:
    """Accuracy by experts a layer, a line for each criterion; None without two measured variants."""
    rows: list[dict[str, Any]] = [
        {
            "experts": variant.experts,
            "accuracy": accuracy.value,
            "low": accuracy.low,
            "high": accuracy.high,
            "criterion": variant.criterion,
            "says": f"{variant.label}: {percent(accuracy.value)} with {number(variant.experts)} experts a layer, "
            f"95 % interval {percent(accuracy.low)} to {percent(accuracy.high)}, {variant.criterion}",
        }
        for variant, accuracy in _measured(variants)
        if variant.experts is not None
    ]
    if len(rows) < 2:
        return None
    names = sorted({row["criterion"] for row in rows}, key=lambda name: (name == UNPRUNED, name))
    whole = [row for row in rows if row["criterion"] == UNPRUNED]
    lines = [{**row, "criterion": name} for name in names for row in whole if name != UNPRUNED]  # where each begins
    lines += [row for row in rows if row["criterion"] != UNPRUNED]
    counts = sorted({row["experts"] for row in rows})
    axis = {"values": counts, "format": ".3~g", "grid": False}
    is_log = counts[0] > 0 and counts[-1] / counts[0] >= 4
    scale = (
        {"type": "log", "base": 2, "padding": 24, "nice": False}
        if is_log
        else {"padding": 24, "zero": False, "nice": False}
    )
    encoding = series("criterion", names)
    title = "experts a layer" + (", on a logarithmic scale" if is_log else "")
    spec = {
        "height": 280,
        "data": {"values": rows},
        "encoding": {
            "x": {"field": "experts", "type": "quantitative", "title": title, "axis": axis, "scale": scale},
            "y": _ACCURACY,
            "color": encoding["color"],
        },
        "layer": [
            {"data": {"values": lines}, "mark": {"type": "line", "strokeWidth": 2, "opacity": 0.55, **SILENT}},
            {
                "mark": {"type": "rule", "strokeWidth": 2, **SILENT},
                "encoding": {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}},
            },
            {"mark": POINT, "encoding": {"shape": encoding["shape"], "description": SAYS}},
        ],
    }
    return both(spec, "Accuracy by experts a layer")


def cost_plot(
    variants: Sequence[Variant], cost: Callable[[Variant], float | None], title: str, say: Callable[[float], str]
) -> Markup | None:
    """Accuracy by ``cost``, the Pareto front as a line; None without two variants of which both are known.

    Args:
        variants: of the run.
        cost: of one of them, smaller is better.
        title: of the axis.
        say: a cost, in words.
    """
    found = [(variant, accuracy.value, cost(variant)) for variant, accuracy in _measured(distinct(variants))]
    known = [(variant, value, price) for variant, value, price in found if price is not None]
    if len(known) < 2:
        return None
    best = pareto({variant.model.path: (price, value) for variant, value, price in known})
    middle = (min(price for _, _, price in known) + max(price for _, _, price in known)) / 2
    rows: list[dict[str, Any]] = [
        {
            "cost": price,
            "accuracy": value,
            "front": "on the Pareto front" if variant.model.path in best else "beaten by another",
            "label": variant.label,
            "side": "left" if price > middle else "right",
            "says": f"{variant.label}: {percent(value)} at {say(price)}"
            + (", on the Pareto front" if variant.model.path in best else ""),
        }
        for variant, value, price in known
    ]
    front = sorted((row for row in rows if row["front"].startswith("on")), key=lambda row: row["cost"])
    states = {
        "domain": ["on the Pareto front", "beaten by another"],
        "range": ["var(--blue)", "var(--soft)"],
    }
    x = {"field": "cost", "type": "quantitative", "title": title, "axis": {"grid": False, "tickCount": 6}}
    is_room = len(front) <= _MOST_LABELS
    labels = [
        {
            "data": {"values": [row for row in front[first::2] if row["side"] == side] if is_room else []},
            "mark": {"type": "text", "align": align, "dx": dx, "dy": dy, "limit": 150, **SILENT},
            "encoding": {"text": {"field": "label"}},
        }
        for side, align, dx in (("left", "right", 4), ("right", "left", -4))
        for first, dy in ((0, -12), (1, 16))  # above and below by turns, so that neighbours do not meet
    ]
    spec = {
        "height": 260,
        "data": {"values": rows},
        "encoding": {
            "x": {**x, "scale": {"zero": False, "padding": 30, "nice": False}},
            "y": _ACCURACY,
        },
        "layer": [
            {
                "data": {"values": front},
                "mark": {
                    "type": "line",
                    "interpolate": "step-after",
                    "color": "var(--blue)",
                    "strokeWidth": 2,
                    "opacity": 0.45,
                    **SILENT,
                },
            },
            {
                "mark": POINT,
                "encoding": {
                    "color": {"field": "front", "type": "nominal", "scale": states},
                    "shape": {
                        "field": "front",
                        "type": "nominal",
                        "scale": {"domain": states["domain"], "range": ["circle", "cross"]},
                    },
                    "description": SAYS,
                },
            },
            *labels,
        ],
    }
    return both(spec, f"Accuracy by {title}", wide=430)


def size_plot(variants: Sequence[Variant]) -> Markup | None:
    """Accuracy by megabytes."""
    return cost_plot(
        variants, lambda variant: variant.file_bytes / 1e6, "megabytes of graph and weights", lambda mb: size(mb * 1e6)
    )


def latency_plot(variants: Sequence[Variant], key: tuple[str, int]) -> Markup | None:
    """Accuracy by median milliseconds of a phase and batch size."""
    phase, batch = key
    title = f"milliseconds, {phase + ', ' if phase else ''}batch of {batch}"
    return cost_plot(variants, lambda variant: variant.latency(key), title, milliseconds)


BINS: tuple[str, ...] = (f"below {MARGIN_EDGES[0]:g}", *(f"{edge:g}" for edge in MARGIN_EDGES))
"""Names of the counts in ``LayerParity.margin_tokens``: from that margin on."""


def margin_plot(layers: Sequence[LayerParity], tolerance: float, label: str) -> Markup | None:
    """Layers by margin: how many tokens had which, and where they flipped; None where nothing was chosen."""
    rows = [
        {
            "layer": layer.name,
            "order": index,
            "margin": name,
            "shade": _shade(tokens, sum(layer.margin_tokens)),
            "tokens": tokens,
            "flips": flips,
            "says": f"{layer.name}, margin {name}{' and more' if place else ''}: {plural(tokens, 'token')}, "
            f"{plural(flips, 'flip')}",
        }
        for index, layer in enumerate(layers)
        for place, (name, tokens, flips) in enumerate(zip(BINS, layer.margin_tokens, layer.margin_flips, strict=False))
    ]
    if not any(row["tokens"] for row in rows):
        return None
    excused = [name for name, upper in zip(BINS, MARGIN_EDGES, strict=False) if upper <= tolerance]
    height = max(18 if len(layers) > 12 else 34, 8) * len(layers)
    spec = {
        "height": height,
        "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "margin",
                "type": "ordinal",
                "sort": list(BINS),
                "title": "the reference's margin, from",
                "axis": {"labelAngle": 0, "domain": False, "ticks": False, "labelOverlap": True},
            },
            "y": {
                "field": "layer",
                "type": "nominal",
                "sort": {"field": "order"},
                "title": None,
                "axis": {"domain": False, "ticks": False, "labelLimit": 130},
            },
        },
        "layer": [
            {
                "mark": {"type": "rect", "stroke": "var(--card)", "strokeWidth": 2, "cornerRadius": 3},
                "encoding": {
                    "color": {"field": "shade", "type": "nominal", "scale": None},
                    "description": SAYS,
                },
            },
            {
                "transform": [{"filter": "datum.flips > 0"}],
                "mark": {
                    **POINT,
                    "shape": "diamond",
                    "color": "var(--vermillion)",
                    "stroke": "var(--card)",
                    **SILENT,
                },
                "encoding": {
                    "size": {"field": "flips", "type": "quantitative", "legend": None, "scale": {"range": [60, 420]}}
                },
            },
            {
                "data": {"values": [{"margin": name} for name in excused[-1:]]},
                "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 2, "color": "var(--ink)", **SILENT},
                "encoding": {
                    "x": {"field": "margin", "type": "ordinal", "sort": list(BINS), "bandPosition": 1},
                    "y": {"value": 0},
                    "y2": {"value": height},
                },
            },
        ],
    }
    return both(spec, f"Flips of {label} by layer and margin", wide=820)


def _shade(tokens: int, total: int) -> str:
    """Darker where more are: logarithmic, so that few are seen too.

    >>> _shade(0, 100), _shade(1, 100), _shade(100, 100)
    ('var(--q0)', 'var(--q1)', 'var(--q7)')
    """
    share = math.log(tokens) / math.log(max(total, 2)) if tokens else 0.0
    return f"var(--q{1 + round(6 * share) if tokens else 0})"


def error_plot(variants: Sequence[Variant]) -> Markup | None:
    """Largest error of each variant's outputs on flip-free examples and under forced routing, beside the tolerance."""
    kinds: Mapping[str, Callable[[OutputParity], float | None]] = {
        "without flips": lambda output: output.max_rel,
        "under the reference's routing": lambda output: output.forced_max_rel,
    }
    rows: list[dict[str, Any]] = []
    for variant in variants:
        report = variant.parity
        for kind, read in kinds.items():
            values = [read(output) for output in (report.outputs if report else ())]
            finite = [value for value in values if value is not None]
            if report is not None and finite:
                worst = max(*finite, 1e-9)
                says = f"{variant.label}, {kind}: {number(max(finite))}, {number(report.tolerance.element)} allowed"
                rows.append({"variant": variant.label, "kind": kind, "error": worst, "says": says})
    allowed = [
        {"variant": variant.label, "error": variant.parity.tolerance.element}
        for variant in variants
        if variant.parity is not None and variant.parity.tolerance.element > 0
    ]
    if not rows or not allowed:
        return None
    ticks = log_ticks([row["error"] for row in (*rows, *allowed)])
    names = [kind for kind in kinds if any(row["kind"] == kind for row in rows)]
    encoding = series("kind", names)
    spec = {
        "height": 30 * len(allowed) + 10,
        "data": {"values": rows},
        "encoding": {
            "y": {
                "field": "variant",
                "type": "nominal",
                "sort": [row["variant"] for row in allowed],
                "title": None,
                "axis": {"grid": True, "domain": False, "ticks": False, "labelLimit": 150, "labelPadding": 14},
            },
            "x": {
                "field": "error",
                "type": "quantitative",
                "title": "largest relative error; the bar is what is allowed",
                "scale": {"type": "log", "domain": [ticks[0], ticks[-1]]},
                "axis": {"values": ticks, "format": ".0e", "labelOverlap": True},
            },
        },
        "layer": [
            {
                "data": {"values": allowed},
                "mark": {"type": "tick", "thickness": 4, "size": 20, "color": "var(--ink)", **SILENT},
            },
            {"mark": POINT, "encoding": {**encoding, "description": SAYS}},
        ],
    }
    return both(spec, "Errors on examples without flips", wide=820)


def memory_plot(fits: Mapping[str, Fit], devices: Mapping[str, tuple[int, int]]) -> Markup | None:
    """What models need, and what devices have, on one logarithmic scale; None where nothing is known."""
    if not fits or not devices:
        return None
    needs: list[dict[str, Any]] = [
        {"name": label, "kind": "a model needs", "low": fit.needs, "says": f"{label} needs {size(fit.needs)} or more"}
        for label, fit in fits.items()
    ]
    has: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": "a device has",
            "low": low,
            "high": high * (1.12 if low == high else 1),
            "says": f"{name} has {size(low)}" + (f" to {size(high)}" if high != low else ""),
        }
        for name, (low, high) in devices.items()
    ]
    ticks = log_ticks([*(row["low"] for row in needs), *(row["high"] for row in has)])
    order = [row["name"] for row in (*needs, *has)]
    units = (("TB", "1e12"), ("GB", "1e9"), ("MB", "1e6"))
    steps = "".join(f"datum.value >= {unit} ? datum.value / {unit} + ' {name}' : " for name, unit in units)
    expression = f"{steps}datum.value / 1e3 + ' kB'"
    kinds = {"domain": ["a model needs", "a device has"], "range": ["var(--blue)", "var(--soft)"]}
    color = {"field": "kind", "type": "nominal", "scale": kinds}
    spec = {
        "height": 22 * len(order) + 10,
        "encoding": {
            "y": {
                "field": "name",
                "type": "nominal",
                "sort": order,
                "title": None,
                "axis": {"grid": True, "domain": False, "ticks": False, "labelLimit": 150},
            },
            "x": {
                "field": "low",
                "type": "quantitative",
                "title": None,
                "scale": {"type": "log", "domain": [ticks[0], ticks[-1]]},
                "axis": {"values": ticks, "labelExpr": expression, "labelOverlap": True},
            },
        },
        "layer": [
            {
                "data": {"values": has},
                "mark": {"type": "bar", "height": 10, "cornerRadius": 5},
                "encoding": {"x2": {"field": "high"}, "color": color, "description": SAYS},
            },
            {
                "data": {"values": needs},
                "mark": POINT,
                "encoding": {"color": color, "description": SAYS},
            },
        ],
    }
    return both(spec, "Memory that models need and that devices have", wide=820)
