"""The dashboard in a real browser: Debian's chromium, headless, driven by Playwright.

With `LLAMESH_TEST_SCREENSHOTS` naming a directory, what it looks like is written there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from tests.support.node import PATIENCE_SECONDS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")

SCREENSHOTS = os.environ.get("LLAMESH_TEST_SCREENSHOTS", "")
PATIENCE_MS = PATIENCE_SECONDS * 1000
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 780}

T = TypeVar("T")


@contextmanager
def browser_page(url: str, *, expected: tuple[str, ...] = (), **context: Any) -> Iterator[Any]:
    """The dashboard at `url`, live or asking for a key. Whatever the browser complains about fails the test,
    but for console messages with one of `expected` in them; so does any request to somebody else.
    """
    complaints: list[str] = []

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in expected):
            complaints.append(f"{message.type}: {message.text} ({message.location})")

    def on_request(request: Any) -> None:
        if not request.url.startswith(url):
            complaints.append(f"asked {request.url}")

    with playwright.sync_playwright() as driver:
        # Root has no sandbox of chromium's; /dev/shm is small in containers.
        arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            page = browser.new_context(
                **{"viewport": DESKTOP, "reduced_motion": "reduce", **context}
            ).new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.on("console", on_console)
            page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
            page.on("request", on_request)
            page.goto(f"{url}/ui/")
            yield page
        finally:
            browser.close()
    assert complaints == [], complaints


async def look(act: Callable[[], T]) -> T:
    """Run something that uses the browser: its interface blocks, so in a thread."""
    return await trio.to_thread.run_sync(act)


def live(page: Any) -> None:
    """Wait until the page has the state and goes on with it."""
    page.locator("#link", has_text="live").wait_for()
    page.locator("body[data-ready]").wait_for()


def no_overflow(page: Any) -> None:
    """Nothing sticks out at the side."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"the page is {wide} pixels wider than the window"


# How much of what is seen has moved by itself, as browsers reckon it: 0.1 is what is felt.
WATCH_SHIFTS = """() => {
  window.moved = 0;
  new PerformanceObserver((list) => {
    for (const one of list.getEntries()) if (!one.hadRecentInput) window.moved += one.value;
  }).observe({ type: "layout-shift" });
}"""

# Texts whose contrast with what is behind them is below 4.5:1 (WCAG AA). Colours that are mixed with what is
# behind them don't occur; what is switched off needn't be readable.
FAINT = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(one).backgroundColor);
      if (alpha > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || !element.checkVisibility() || element.disabled || element.closest("noscript")) continue;
    const style = getComputedStyle(element);
    const colour = parse(element.namespaceURI.endsWith("svg") ? style.fill : style.color).slice(0, 3);
    const [high, low] = [light(colour), light(behind(element))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    const text = element.textContent.slice(0, 30);
    if (ratio < 4.5) found.push(`${element.tagName} ${text}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


def faint(page: Any) -> Any:
    """What is hard to read."""
    return page.evaluate(FAINT)


FOCUSED = """() => {
  const one = document.activeElement, style = getComputedStyle(one);
  return {
    name: one === document.body ? "BODY" : one.id || one.textContent.trim().slice(0, 40) || one.tagName,
    outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
  };
}"""


def shoot(page: Any, name: str, section: str) -> None:
    """Keep what it looks like from a section on, where that is wanted."""
    if SCREENSHOTS:
        page.evaluate("document.activeElement.blur()")
        page.locator(section).evaluate("element => element.scrollIntoView()")
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))
