"""Opens trace pages in a headless browser and looks at them: `make screenshots`.

    python -m tests.screenshots FOLDER [DOCUMENT ...]

Makes a page of each document (an OTLP/JSON file, as `fermata trace --json` prints it), or of made-up ones, and writes
it and pictures of it into the folder: two widths, light and dark. Fails when a page is wider than its window or when
its script complains.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, sync_playwright

from fermata.trace import read_trace
from fermata.trace_page import trace_page
from tests.unit.clients.trace_document import Plan, trace_document

WIDTHS = (1280, 700)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Those that are taken when they are installed; else the one that playwright installs."""

MADE_UP = {
    "usual": Plan(),
    "long": Plan(tokens=3000, per_span=1024, forgotten=2000, planted={**Plan().planted, 2400: Plan().planted[57]}),
    "choices": Plan(tokens=120, choices=4, resumed_at=80, error="UNAVAILABLE"),
    "nothing": Plan(tokens=0),
}


def main() -> int:
    """Writes pages and pictures; returns 1 when one of them is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where pages and pictures go")
    parser.add_argument("documents", nargs="*", type=Path, metavar="DOCUMENT", help="OTLP/JSON files")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    documents = {path.stem: path.read_bytes() for path in given.documents} or {
        name: trace_document(plan) for name, plan in MADE_UP.items()
    }
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        for name, document in documents.items():
            page = given.folder / f"{name}.html"
            page.write_text(trace_page(read_trace(document)), encoding="utf-8")
            complaints += [f"{name}: {complaint}" for complaint in look(browser, page)]
        browser.close()
    print(*complaints or [f"{len(documents)} pages are well, see {given.folder}"], sep="\n")
    return 1 if complaints else 0


def noting(said: list[str], read: Callable[[Any], str]) -> Callable[[Any], None]:
    """Notes what a browser says."""
    return lambda event: said.append(read(event))


def look(browser: Browser, page: Path) -> Iterator[str]:
    """Takes pictures of a page, which go beside it, and tells what is wrong with it."""
    for width in WIDTHS:
        for scheme in SCHEMES:
            said: list[str] = []
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.on("console", noting(said, lambda message: str(message.text)))
            tab.on("pageerror", noting(said, str))
            tab.goto(page.resolve().as_uri())
            links = tab.locator("[data-token]")
            if links.count():
                links.first.click()  # the chart shows what is known of a token
            needed = tab.evaluate("document.documentElement.scrollWidth")
            tab.screenshot(path=page.with_name(f"{page.stem}-{width}-{scheme}.png"), full_page=True)
            tab.close()
            if needed > width:
                yield f"at {width} pixels it needs {needed}"
            yield from said


if __name__ == "__main__":
    sys.exit(main())
