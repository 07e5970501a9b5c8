"""A page in Chromium, without a network: what it asked for and complained of is kept."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
NARROW = 390


def executable() -> str | None:
    """The browser of this machine, if it has one; nothing is downloaded."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Started, and ended with the block."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield started
        started.close()


@dataclasses.dataclass(frozen=True)
class Opened:
    """A page, with all that it did beside showing itself."""

    page: Page
    requests: list[str]
    complaints: list[str]


def open_file(started: Browser, path: Path, width: int = 1280, **options: object) -> Opened:
    """``path`` by its file address, offline."""
    context = started.new_context(viewport={"width": width, "height": 900}, offline=True, **options)  # type: ignore[arg-type]
    opened = Opened(context.new_page(), [], [])
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.goto(path.resolve().as_uri())
    return opened
