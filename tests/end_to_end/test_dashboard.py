"""What the dashboard shows, in a real browser; `LLAMESH_TEST_SCREENSHOTS=DIR` keeps what it looks like."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.end_to_end.cookbooks import cookbook, profile
from tests.end_to_end.mesh.parts import fakes
from tests.support.browser import (
    PATIENCE_MS,
    PHONE,
    SCREENSHOTS,
    WATCH_SHIFTS,
    browser_page,
    faint,
    live,
    look,
    needs_chromium,
    no_overflow,
    shoot,
)
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.fake_nvml import FakeDevice, FakeNvml, build_library
from tests.support.mesh import Mesh, running_mesh
from tests.support.node import running_node

pytestmark = needs_chromium


@asynccontextmanager
async def lively_mesh(directory: Path) -> AsyncIterator[Mesh]:
    """Two nodes: one with devices and models of all states, one without, and requests that don't end."""
    devices = [
        FakeDevice("GPU-1", used=9_200, utilisation=71, name="NVIDIA RTX 4090"),
        FakeDevice("GPU-2", used=3_100, utilisation=12, name="NVIDIA RTX 4090"),
    ]
    library = build_library(directory)
    nvml = FakeNvml(library, directory / "nvml")
    nvml.write(*devices)
    later = str(directory / "later")
    mine = fakes(
        directory / "models",
        entry={"estimated_vram_mb": 6000, "estimated_sysmem_mb": 900},
        qwen3={"slots": 4, "token_delay": 0.02},
        gemma3={"slots": 2, "token_delay": 0.03},
        broken={"exit_at_start": {"code": 1, "lines": ["error: tensor 'blk.0.attn_q.weight' not found"]}},
        mistral={"slots": 2, "ready_when": later},
    )
    mine["models"][0]["description"] = "Qwen3 30B A3B, Q4_K_M: the one for everything"
    mine["models"].append(
        {
            "name": "absent",
            "profiles": [profile(directory / "models" / "absent.gguf")],
            "description": "no file",
        }
    )
    slow = {"slots": 2, "token_delay": 0.03}
    theirs = fakes(directory / "theirs", phi4={"slots": 1, "token_delay": 0.05}, gemma3=slow)
    async with running_mesh(
        directory,
        {"atlas": mine, "borealis": theirs},
        binary_path=FAKE_LLAMA_SERVER,
        config={"cluster": {"gossip_interval_seconds": 1.0}},  # a browser leaves little of the machine
        start=(),
    ) as mesh:
        mesh["atlas"].change(env=nvml.environment())
        await mesh.start("atlas", "borealis")
        await mesh.wait_joined()
        yield mesh


async def test_it_shows_the_whole_mesh(tmp_path: Path) -> None:
    """Nodes, models, instances and requests of both nodes, in both colours and on a phone."""
    async with lively_mesh(tmp_path) as mesh, trio.open_nursery() as clients:
        atlas, borealis = mesh["atlas"], mesh["borealis"]
        await atlas.node.client.post("/admin/prewarm", json={"model": "gemma3"})
        assert (await atlas.ask("broken")).status >= 500

        async def talk(member: Any, model: str) -> None:
            with trio.CancelScope():
                while True:
                    try:
                        await member.ask(model, stream=True, max_tokens=4000)
                    except httpx.HTTPError:
                        await trio.sleep(0.1)

        for member, model in (
            (atlas, "qwen3"),
            (atlas, "phi4"),
            (borealis, "qwen3"),
            *[(atlas, "gemma3")] * 3,
        ):
            clients.start_soon(talk, member, model)
        clients.start_soon(talk, atlas, "mistral")

        def see() -> None:
            with browser_page(atlas.node.url, color_scheme="light") as page:
                live(page)
                page.locator("#request-rows .badge", has_text="decode").first.wait_for()
                assert page.locator("#node-cards .node").count() == 2
                assert page.locator("[data-node=atlas] .tag").is_visible()
                assert page.locator("[data-node=borealis] h3").inner_text() == "borealis"
                cells = page.locator("tr[data-model='phi4:default'] button.cell:visible")
                assert cells.count() == 1
                page.locator("tr[data-model='broken:default'] .badge[data-look=bad]").wait_for()
                page.locator("#concerns .concern", has_text="load failed").wait_for()
                assert "attn_q" in page.locator("#concerns").inner_text()
                assert page.locator("#calm").is_hidden()
                path = page.locator("td.path", has_text="atlas → borealis")
                path.first.wait_for()
                # Why it went there, in milliseconds, for both nodes; the row stays open while all goes on.
                forwarded = page.locator("#request-rows tr", has=path).filter(has_text="gemma3")
                forwarded.first.wait_for(timeout=3 * PATIENCE_MS)  # a third one, beside two long ones
                forwarded.first.locator(".toggle").click()
                for node in ("atlas", "borealis"):
                    told = page.locator(".detail-row .candidates li", has_text=node).inner_text()
                    assert re.search(r"\d ms|\d s", told), told
                    assert "decode" in told
                row = page.locator("#instance-rows tr", has_text="phi4:default#")
                row.get_by_role("button", name="Log").click()
                page.locator("#log-lines > div", has_text="request POST").first.wait_for()
                assert page.locator("#log-child").input_value().startswith("phi4:default#")
                page.evaluate("scrollTo(0, 0)")
                no_overflow(page)
                assert faint(page) == []
                page.evaluate(WATCH_SHIFTS)
                page.wait_for_timeout(25_000 if SCREENSHOTS else 4000)
                moved = page.evaluate("window.moved")
                assert moved < 0.01, f"things on the page jump ({moved})"
                shoot(page, "light", "#main")
                page.locator("#theme").click()
                page.locator("#theme").click()
                assert page.evaluate("document.documentElement.dataset.theme") == "dark"
                assert faint(page) == []
                shoot(page, "dark", "#instances")
                page.set_viewport_size(PHONE)
                no_overflow(page)
                shoot(page, "phone", "#main")
                shoot(page, "phone-requests", "#requests")
                shoot(page, "phone-instances", "#models")
                shoot(page, "phone-chat", "#chat")

        await look(see)
        clients.cancel_scope.cancel()


async def test_a_chat_is_streamed_and_a_model_unloaded(tmp_path: Path, tiny_model: Path) -> None:
    async with running_node(tmp_path, cookbook(tiny=profile(tiny_model))) as node:

        def use() -> None:
            with browser_page(node.url) as page:
                live(page)
                assert "All is well" in page.locator("#calm").inner_text()
                assert page.locator("#instances-empty").is_visible()
                # The model is found by typing, with the keyboard alone.
                page.locator("#chat-model").focus()
                page.locator("#chat-model").click()
                page.keyboard.type("tin")
                page.keyboard.press("Enter")
                page.locator("#chat-tokens").fill("24")
                place = "document.getElementById('chat').offsetTop"
                before = page.evaluate(place)
                page.locator("#question").fill("Hello <b>there</b>")
                page.keyboard.press("Enter")
                page.locator("#instance-rows tr").wait_for()
                page.locator("#chat-figures", has_text="24 tokens").wait_for()
                figures = page.locator("#chat-figures").inner_text()
                assert "first token" in figures
                assert "tokens/s" in figures
                assert abs(page.evaluate(place) - before) <= 2, "the chat jumps when it is used"
                assert page.locator(".said-by.model .body").inner_text()
                assert page.locator(".said-by.user .body").inner_text() == "Hello <b>there</b>"
                assert page.locator("#talk b").count() == 0
                shoot(page, "chat", "#chat")
                # Its instance is there; its log is shown; and it goes when it is told to.
                row = page.locator("#instance-rows tr", has_text="tiny:default#1")
                row.locator(".badge[data-look=good]").wait_for()
                row.get_by_role("button", name="Log").click()
                page.locator("#log-lines > div").first.wait_for()
                row.get_by_role("button", name="Unload…").click()
                page.locator("#sheet").get_by_role("button", name="Cancel").click()
                assert row.is_visible()
                row.get_by_role("button", name="Unload…").click()
                page.locator("#sheet").get_by_role("button", name="Unload", exact=True).click()
                page.locator(".toast", has_text="unloading tiny:default#1").wait_for()
                row.wait_for(state="detached")
                page.locator("#event-rows", has_text="unload").first.wait_for()
                # What ended is still explained.
                page.locator("#requests").get_by_role("button", name="Recent").click()
                page.locator("#request-rows .toggle").first.click()
                page.locator(".detail-row", has_text="served by node-a").wait_for()
                # Loaded again, before anyone asks.
                page.locator("tr[data-model='tiny:default']").get_by_role("button", name="Load…").click()
                shoot(page, "load", "#models")
                page.locator("#sheet").get_by_role("button", name="Load", exact=True).click()
                page.locator("tr[data-model='tiny:default'] .badge", has_text="loaded").wait_for()

        await look(use)


async def test_a_request_is_cancelled_and_a_chat_stopped(tmp_path: Path) -> None:
    recipes = fakes(tmp_path, m={"gate": str(tmp_path / "never"), "gate_after": 2, "slots": 1})
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:

        def use() -> None:
            # A stream that an operator ends is cut, and the browser says so.
            with browser_page(node.url, expected=("ERR_INCOMPLETE_CHUNKED_ENCODING",)) as page:
                live(page)
                for act in ("cancel", "stop"):
                    page.locator("#question").fill("Are you there?")
                    page.locator("#send").click()
                    page.locator("#request-rows .badge", has_text="decode").wait_for()
                    if act == "stop":
                        page.locator("#stop").click()
                        page.locator("#chat-figures", has_text="stopped").wait_for()
                    else:
                        page.locator("#request-rows [data-act=cancel]").click()
                        page.locator("#sheet").get_by_role("button", name="Cancel the request").click()
                        page.locator(".said-by.wrong", has_text="cancelled").wait_for()
                    page.locator("#requests-empty").wait_for()
                    assert page.locator("#send").is_visible()

        await look(use)


async def test_with_auth_it_asks_for_a_key_and_keeps_it_in_the_tab(tmp_path: Path) -> None:
    auth = {"auth": {"enabled": True, "allowed_keys": ["key-of-the-test"]}}
    async with running_node(tmp_path, fakes(tmp_path, m={}), auth, binary_path=FAKE_LLAMA_SERVER) as node:

        def use() -> None:
            with browser_page(node.url, expected=("401",)) as page:
                dialog = page.locator("#key-dialog")
                dialog.wait_for()
                page.locator("#key").fill("wrong")
                page.keyboard.press("Enter")
                page.locator("#key-text", has_text="isn't valid").wait_for()
                page.locator("#key").fill("key-of-the-test")
                page.keyboard.press("Enter")
                live(page)
                dialog.wait_for(state="hidden")
                kept = page.evaluate("JSON.stringify([{...localStorage}, document.cookie, location.href])")
                assert "key-of-the-test" not in kept
                page.reload()
                live(page)
                assert dialog.is_hidden()

        await look(use)


async def test_a_lost_connection_is_said_and_comes_back(tmp_path: Path) -> None:
    lost = ("ERR_", "Failed to load resource")
    recipes = {"atlas": fakes(tmp_path / "models", m={})}
    async with running_mesh(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as mesh:
        atlas = mesh["atlas"]

        def use() -> None:
            with browser_page(atlas.node.url, expected=lost) as page:
                live(page)
                trio.from_thread.run(atlas.kill)
                page.locator("#link", has_text="connection lost").wait_for()
                assert page.locator("#retry").is_visible()
                assert page.locator("#node-cards .node").count() == 1  # what was known stays
                trio.from_thread.run(atlas.start)
                page.locator("#link", has_text="live").wait_for()

        await look(use)


async def test_mistakes_in_the_cookbook_are_in_plain_sight(tmp_path: Path) -> None:
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:

        def use() -> None:
            with browser_page(node.url) as page:
                live(page)
                (tmp_path / "cookbook.yaml").write_text("models:\n  - nome: m\n")
                concern = page.locator("#concerns .concern", has_text="nome")
                concern.first.wait_for()
                assert "cookbook.yaml" in concern.first.inner_text()

        await look(use)
