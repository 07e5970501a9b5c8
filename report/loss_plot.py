"""The picture beside the verdict: what each pruned variant loses, against what it may."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from report.charts import POINT, SAYS, SILENT, Spec, both
from report.variants import Variant, distinct
from report.verdict import COSTS, FAILS, SHIP, Verdict, kind_of, loss_of
from report.words import number, percent, plural, points, size

_MOST = 12
_TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
_STATES = {SHIP: "may ship", COSTS: "loses too much", FAILS: "is wrong"}
_COLOURS = ("var(--green)", "var(--orange)", "var(--vermillion)")
_SHAPES = ("circle", "cross", "triangle-up")


def loss_plot(variants: Sequence[Variant], verdict: Verdict) -> tuple[Markup, str] | None:
    """Points of accuracy lost, a row for each pruned or rounded variant, and what there is to say of it.

    None where no loss is known.
    """
    judged = _judged(variants, verdict)
    shown = [variant for variant in judged if variant.label == verdict.chosen or variant in judged[-_MOST:]]
    rows = [_row(variant, loss, verdict) for variant in shown if (loss := loss_of(variant, variants)) is not None]
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
    kind = kind_of(judged)
    caption = (
        f"Points of accuracy that each {kind} variant loses, smallest last. The shaded part is what may be lost; lines "
        "are 95\N{NO-BREAK SPACE}% intervals."
    )
    if len(shown) < len(judged):
        caption += f" {len(judged) - len(shown)} larger ones are left out: the table below has them."
    chart = both(spec, f"Points of accuracy lost by each {kind} variant, {limit}", wide=300, narrow=180)
    return chart, caption


def _judged(variants: Sequence[Variant], verdict: Verdict) -> list[Variant]:
    """Those of which the loss is known, largest first."""
    first = sorted(variants, key=lambda variant: variant.label != verdict.chosen)  # stands for its other forms
    known = [variant for variant in distinct(first) if verdict.decisions[variant.label] in _STATES]
    known = [variant for variant in known if not variant.unpruned and loss_of(variant, variants) is not None]
    return sorted(known, key=lambda variant: -variant.rank[0])


def _row(variant: Variant, loss: float, verdict: Verdict) -> dict[str, Any]:
    accuracy, state = variant.accuracy, _STATES[verdict.decisions[variant.label]]
    assert accuracy is not None
    return {
        "name": f"{variant.label}, {size(variant.file_bytes)}",
        "loss": 100 * loss,
        "low": 100 * (loss - (accuracy.high - accuracy.value)),
        "high": 100 * (loss + (accuracy.value - accuracy.low)),
        "state": state,
        "says": f"{variant.label}: {points(-loss)} points, {percent(accuracy.value)} of "
        f"{plural(accuracy.examples, 'example')}, {size(variant.file_bytes)}: {state}",
    }
