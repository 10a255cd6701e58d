"""Pages of other sites in a real browser: cross-site requests, DNS rebinding, and pages that are allowed.

The browser resolves every name to this machine, as an attacker's name server would say; the first page of a
name is the attacker's, everything else under that name is the node. That newer browsers ask people before a
page may use their network is switched off: it isn't what the node relies on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.mesh.parts import fakes
from tests.end_to_end.test_dashboard import look
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.node import PATIENCE_SECONDS, Node, running_node

playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")

# Asks for a list of [method, path, content type]; says the status of each, 0 or -1 where it can't be known.
ASK = """async ([base, wishes, mode]) => {
  const found = [];
  for (const [method, path, kind] of wishes) {
    const options = {method, mode, referrerPolicy: "no-referrer"};
    const body = path.endsWith("drain") ? "{}" : '{"model": "m", "messages": []}';
    if (method === "POST") options.body = new Blob([body], {type: kind});
    try { found.push((await fetch(base + path, options)).status); } catch { found.push(-1); }
  }
  return found;
}"""

INFERENCE = [["POST", "/v1/chat/completions", kind] for kind in ("text/plain", "", "multipart/form-data")]
JSON = [["POST", "/v1/chat/completions", "application/json"]]
ACTS = [["POST", path, "text/plain"] for path in ("/admin/prewarm", "/admin/drain", "/models/load")]
PRIVATE = [
    ["GET", path, ""] for path in ("/api/v1/state", "/logs/stream", "/upstream/m/health", "/ui/", "/unload")
]


@contextmanager
def attacker() -> Iterator[Callable[[str], Any]]:
    """Opens pages of any origin, in a browser that finds this machine behind every name."""
    with playwright.sync_playwright() as driver:
        arguments = ["--disable-dev-shm-usage", "--host-resolver-rules=MAP * 127.0.0.1"]
        arguments += ["--disable-features=LocalNetworkAccessChecks,PrivateNetworkAccessChecks"]
        arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)

        def page_of(origin: str) -> Any:
            page = browser.new_page()
            page.set_default_timeout(PATIENCE_SECONDS * 1000)
            url = f"{origin}/attack"
            page.route(url, lambda route: route.fulfill(content_type="text/html", body="<p>hello"))
            page.goto(url)
            page.unroute(url)  # Playwright answers preflights by itself while there is a route
            return page

        try:
            yield page_of
        finally:
            browser.close()


def asked(*wishes: tuple[str, str, list[list[str]]]) -> list[list[int]]:
    """What becomes of requests of pages: (origin, where to, requests) each."""
    with attacker() as page_of:
        return [page_of(origin).evaluate(ASK, [base, told, "cors"]) for origin, base, told in wishes]


async def untouched(node: Node) -> None:
    """Nothing was started or changed."""
    assert node.find_events("starting") == []
    assert (await node.client.get("/readyz")).status_code == 200


async def test_a_page_of_another_site_does_nothing(tmp_path: Path) -> None:
    """Neither by fetch nor by what pages could always do: forms, images, beacons."""
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        evil, wishes = "http://evil.example", [*INFERENCE, *JSON, *ACTS, *PRIVATE]

        def every_way() -> None:
            with attacker() as page_of:
                page = page_of(evil)
                for name in ("127.0.0.1", "localhost"):
                    for mode in ("cors", "no-cors"):
                        found = page.evaluate(ASK, [f"http://{name}:{node.port}", wishes, mode])
                        assert set(found) <= {0, -1}, "it can read nothing"
                page.evaluate(
                    """async (base) => {
                      const seen = [];
                      for (const path of ["/unload", "/upstream/m/props"]) {
                        const image = new Image();
                        seen.push(new Promise((done) => { image.onerror = image.onload = done; }));
                        image.src = base + path;
                      }
                      navigator.sendBeacon(base + "/v1/chat/completions", '{"model": "m"}');
                      navigator.sendBeacon(base + "/admin/drain", "{}");
                      await Promise.all(seen);
                    }""",
                    f"http://127.0.0.1:{node.port}",
                )
                form = (
                    f"<form method=post enctype=text/plain action='http://127.0.0.1:{node.port}/admin/drain'>"
                )
                page.set_content(form + "<input name='{\"a\":\"' value='\"}'></form>")
                with page.expect_navigation():
                    page.evaluate("document.forms[0].submit()")
                assert "forbidden" in page.content()

        await look(every_way)
        await untouched(node)
        refused = [entry for entry in node.find_events("request") if entry["error"] == "forbidden"]
        assert len(refused) >= 4 * len(INFERENCE), "the browser did send them"


async def test_a_rebound_page_does_nothing(tmp_path: Path) -> None:
    """For the browser it is the node's own page; the name gives it away."""
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        evil, own = f"http://evil.example:{node.port}", f"http://localhost:{node.port}"
        wishes = [*INFERENCE, *JSON, *ACTS, *PRIVATE]
        [found] = await look(lambda: asked((evil, evil, wishes)))
        assert found == [403] * len(wishes)
        await untouched(node)
        # The same page under a name that is the node's.
        usual = [*JSON, ["GET", "/api/v1/state", ""], ["GET", "/ui/", ""], ["POST", "/admin/undrain", ""]]
        assert await look(lambda: asked((own, own, usual))) == [[200] * 4]


async def test_pages_that_are_allowed_use_it_by_any_name(tmp_path: Path) -> None:
    config = {
        "http": {"cors_allowed_origins": ["http://chat.example"], "allowed_hosts": ["*.lab.example"]},
    }
    async with running_node(tmp_path, fakes(tmp_path, m={}), config, binary_path=FAKE_LLAMA_SERVER) as node:
        wishes, own = [*JSON, ["GET", "/api/v1/state", ""]], f"http://a.lab.example:{node.port}"
        found = await look(
            lambda: asked(
                ("http://chat.example", f"http://127.0.0.1:{node.port}", wishes),
                ("http://chat.example", f"http://gpu1.example:{node.port}", wishes),
                (own, own, wishes),
                ("http://other.example", own, wishes),
            )
        )
        assert found == [[200, 200]] * 3 + [[-1, -1]]
