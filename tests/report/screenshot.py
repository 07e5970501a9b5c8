"""A picture of a report, as Chromium shows it: ``python -m tests.report.screenshot REPORT.html PICTURE.png``.

``make screenshot`` makes the one in README, of the demo's report.
"""

import argparse
from pathlib import Path

from PIL import Image

from tests.report.chromium import browser, open_file

COLOURS = 128
"""Enough for a page, in a third of the bytes."""


def screenshot(report: Path, picture: Path, *, width: int = 1180, height: int = 1420, dark: bool = False) -> None:
    """The top of ``report``, so many pixels wide and high."""
    with browser() as started:
        page = open_file(started, report, width, color_scheme="dark" if dark else "light").page
        page.set_viewport_size({"width": width, "height": height})
        page.screenshot(path=picture)
    with Image.open(picture) as shot:
        shot.convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="the HTML file")
    parser.add_argument("picture", type=Path, help="the PNG file")
    parser.add_argument("--dark", action="store_true", help="as a system shows it that is set to dark")
    arguments = parser.parse_args()
    screenshot(arguments.report, arguments.picture, dark=arguments.dark)


if __name__ == "__main__":
    main()
