"""The picture beside the verdict: what each pruned variant loses, against what it may."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from report.charts import POINT, SAYS, SILENT, Spec, both
from report.variants import Variant, distinct
from report.verdict import COSTS, FAILS, SHIP, Verdict, is_pruned
from report.words import number, percent, plural, points, size

_MOST = 12
_TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
_STATES = {SHIP: "may ship", COSTS: "loses too much", FAILS: "is wrong"}
_COLOURS = ("var(--green)", "var(--orange)", "var(--vermillion)")
_SHAPES = ("circle", "cross", "triangle-up")


def loss_plot(variants: Sequence[Variant], verdict: Verdict) -> Markup | None:
    """Points of accuracy lost, a row for each pruned variant; None where no loss is known."""
    rows = _rows(variants, verdict)
    if not rows:
        return None
    allowed = 100 * verdict.max_loss
    ends = [end for row in rows for end in (row["low"], row["high"])]
    low, high = min(*ends, 0.0) - 0.2, max(*ends, 2 * allowed)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    states = [said for state, said in _STATES.items() if any(row["state"] == said for row in rows)]
    looks = {said: (hue, shape) for said, hue, shape in zip(_STATES.values(), _COLOURS, _SHAPES, strict=True)}
    hues, shapes = ([looks[state][index] for state in states] for index in (0, 1))
    height = max(26 * len(rows), 60)
    limit = f"{number(allowed)} allowed"
    y: Spec = {
        "field": "name",
        "type": "nominal",
        "sort": [row["name"] for row in rows],
        "title": None,
        "axis": {"domain": False, "ticks": False, "grid": False, "labelLimit": 190, "labelPadding": 10},
    }
    x: Spec = {
        "field": "loss",
        "type": "quantitative",
        "title": "points lost",
        "scale": {"type": "symlog", "constant": 1, "domain": [low, high], "nice": False},
        "axis": {"values": ticks, "grid": True, "labelOverlap": True},
    }
    color: Spec = {"field": "state", "type": "nominal", "scale": {"domain": states, "range": hues}}
    spec = {
        "height": height,
        "data": {"values": rows},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "data": {"values": [{"loss": low, "until": allowed}]},
                "mark": {"type": "rect", "color": "var(--green)", "opacity": 0.12, **SILENT},
                "encoding": {"x2": {"field": "until"}, "y": {"value": 0}, "y2": {"value": height}},
            },
            {
                "data": {"values": [{"loss": allowed, "says": limit}]},
                "mark": {"type": "rule", "color": "var(--green)", "strokeWidth": 2, **SILENT},
                "encoding": {"y": {"value": 0}, "y2": {"value": height}},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.6, **SILENT},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "color": color},
            },
            {
                "mark": POINT,
                "encoding": {
                    "color": color,
                    "shape": {"field": "state", "type": "nominal", "scale": {"domain": states, "range": shapes}},
                    "description": SAYS,
                },
            },
        ],
    }
    return both(spec, f"Points of accuracy lost by each pruned variant, {limit}", wide=300, narrow=180)


def _rows(variants: Sequence[Variant], verdict: Verdict) -> list[dict[str, Any]]:
    """Largest first."""
    baseline = verdict.baseline
    rows: list[dict[str, Any]] = []
    for variant in sorted(distinct(variants), key=lambda variant: -variant.rank[0]):
        accuracy, state = variant.accuracy, verdict.decisions[variant.label]
        if accuracy is None or baseline is None or state not in _STATES or not is_pruned(variant, variants):
            continue
        loss = baseline.value - accuracy.value
        rows.append(
            {
                "name": f"{variant.label}, {size(variant.file_bytes)}",
                "loss": 100 * loss,
                "low": 100 * (baseline.value - accuracy.high),
                "high": 100 * (baseline.value - accuracy.low),
                "state": _STATES[state],
                "says": f"{variant.label}: {points(-loss)} points, {percent(accuracy.value)} of "
                f"{plural(accuracy.examples, 'example')}, {size(variant.file_bytes)}: {_STATES[state]}",
            }
        )
    return rows[:_MOST]
