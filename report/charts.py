"""Charts as SVG, drawn by Vega-Lite when the page is written.

Colours are the page's own CSS variables, so one drawing serves light, dark and print. Every mark says its numbers in
its ``aria-label``, which is what a screen reader reads and what the page shows on hover.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import vl_convert
from markupsafe import Markup

VEGA_LITE = "5.21"
FONT = "Inter, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif"
WIDE, NARROW = 520, 300
"""Widths of the plot itself, for a column and for a telephone."""

HUES = ("var(--blue)", "var(--vermillion)", "var(--green)", "var(--purple)", "var(--sky)", "var(--orange)")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
"""A series has its own colour and its own shape."""

Spec = Mapping[str, Any]

POINT: Spec = {"type": "point", "filled": True, "size": 110, "opacity": 1}
SILENT: Spec = {"aria": False}
"""A mark that a screen reader need not hear of: the points say it."""
SAYS: Spec = {"field": "says", "type": "nominal"}

_CONFIG: Spec = {
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "labelFontSize": 12,
        "titleColor": "var(--ink)",
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "titlePadding": 10,
        "gridColor": "var(--line)",
        "domainColor": "var(--rule)",
        "tickColor": "var(--rule)",
        "tickSize": 4,
        "labelPadding": 4,
    },
    "legend": {
        "orient": "top",
        "direction": "horizontal",
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "title": None,
        "symbolSize": 90,
        "symbolOpacity": 1,
        "columnPadding": 18,
        "labelLimit": 0,
        "offset": 12,
    },
    "text": {"font": FONT, "fontSize": 12, "fill": "var(--ink)"},
}


def draw(spec: Spec, title: str, width: int) -> Markup:
    """``spec``, ``width`` pixels wide without its axes, as an SVG element called ``title``."""
    whole = {"background": None, "padding": 6, "config": _CONFIG, "width": width, **spec}
    svg = vl_convert.vegalite_to_svg(json.dumps(_plain(whole), allow_nan=False), vl_version=VEGA_LITE)
    head = f'role="graphics-document" aria-label="{Markup.escape(title)}"'
    return Markup(svg.replace("<svg ", f"<svg {head} ", 1))  # noqa: S704 - Vega escapes what it is given


def both(spec: Spec, title: str, wide: int = WIDE, narrow: int = NARROW) -> Markup:
    """Drawn for a wide page and for a narrow one; the style sheet shows one of them."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        draw(spec, title, wide), draw(spec, title, narrow)
    )


def _plain(value: Any) -> Any:
    """What JSON can say: numbers that are none become null, halves of characters become a question mark."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, Sequence) else value


def series(field: str, names: Sequence[str]) -> Spec:
    """Encodings that give each of ``names`` a colour and a shape of its own."""
    count = len(names)
    hues = [HUES[index % len(HUES)] for index in range(count)]
    shapes = [SHAPES[index % len(SHAPES)] for index in range(count)]
    legend = {} if count > 1 else {"legend": None}
    return {
        "color": {"field": field, "type": "nominal", "scale": {"domain": list(names), "range": hues}, **legend},
        "shape": {"field": field, "type": "nominal", "scale": {"domain": list(names), "range": shapes}, **legend},
    }


def log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten from below the smallest to above the largest of ``values``.

    >>> log_ticks([3e-07, 2e-05])
    [1e-07, 1e-06, 1e-05, 0.0001]
    """
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [float(f"1e{power}") for power in range(low, max(high, low + 1) + 1)]
