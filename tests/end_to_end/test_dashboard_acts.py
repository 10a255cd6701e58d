"""What is done from the dashboard, to any node, and by whom: in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.end_to_end.cookbooks import profile
from tests.end_to_end.mesh.parts import fakes
from tests.support.browser import FOCUSED, browser_page, live, look, needs_chromium
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import running_mesh
from tests.support.node import running_node

pytestmark = needs_chromium


def act(page: Any, place: str, name: str, confirm: str, said: str) -> None:
    """Press a button, agree, and wait for what came of it."""
    page.locator(place).get_by_role("button", name=re.compile(f"^{re.escape(name)}")).click()
    page.locator("#sheet").get_by_role("button", name=confirm, exact=True).click()
    page.locator(".toast", has_text=said).first.wait_for()
    page.locator("#sheet").wait_for(state="hidden")


async def test_any_node_is_administered_from_any_page(tmp_path: Path) -> None:
    """The page of one node, and every act at the other one; each is asked about first, and seen after."""
    cookbooks = {"atlas": fakes(tmp_path / "a", m={}), "borealis": fakes(tmp_path / "b", m={}, far={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()

        def use() -> None:
            with browser_page(mesh["atlas"].node.url, expected=("400",)) as page:
                live(page)
                card, instances = "[data-node=borealis].node", "#instance-rows"
                state = page.locator(f"{card} .badge")
                state.filter(has_text="ready").wait_for()
                act(page, card, "Drain…", "Drain", "borealis is draining")
                state.filter(has_text="takes no requests").wait_for()
                assert page.locator("[data-node=atlas].node .badge").inner_text() == "ready"
                act(page, card, "Undrain…", "Undrain", "borealis takes requests again")
                state.filter(has_text="ready").wait_for()
                # From the cell of a model, and from the row of its instance.
                page.locator("tr[data-model='far:default'] button.cell[data-node=borealis]").click()
                page.locator("#sheet").get_by_role("button", name="Load here…").click()
                assert page.locator("#load-node").input_value() == "borealis"
                page.locator("#sheet").get_by_role("button", name="Load", exact=True).click()
                page.locator(instances, has_text="far:default#1").wait_for()
                page.locator("tr[data-model='far:default'] .badge", has_text="loaded").wait_for()
                act(page, instances, "Unload…", "Unload", "unloading far:default#1 on borealis")
                page.locator("#instances-empty").wait_for()
                # What is seldom done.
                page.locator("tr[data-model='m:default']").get_by_role("button", name="Load…").click()
                page.locator("#load-node").select_option("borealis")
                page.locator("#sheet").get_by_role("button", name="Load", exact=True).click()
                page.locator(instances, has_text="borealis").locator(".badge[data-look=good]").wait_for()
                for choice, confirm, said in (
                    ("Unload all…", "Unload all", "unloading m:default#2 on borealis"),
                    ("Pause…", "Pause", "borealis is paused"),
                    ("End the pause…", "End the pause", "the pause of borealis is over"),
                    ("Read files…", "Read them", "borealis: nothing new"),
                ):
                    page.locator(card).get_by_role("button", name="More…").click()
                    act(page, "#sheet", choice, confirm, said)
                # A refusal is shown where one asked, in the node's own words.
                page.locator(card).get_by_role("button", name="More…").click()
                page.locator("#sheet").get_by_role("button", name="Update llama.cpp…").click()
                page.locator("#sheet").get_by_role("button", name="Update", exact=True).click()
                page.locator("#sheet-problem", has_text="llama_cpp.enabled").wait_for()

        await look(use)
        asked = mesh["borealis"].node.find_events("administered by another node", peer="atlas")
        assert {one["act"] for one in asked} == {
            "drain", "undrain", "prewarm", "unload", "pause", "reload", "rebuild-llama",
        }  # fmt: skip


async def test_who_may_only_look_sees_why(tmp_path: Path) -> None:
    """A key that doesn't administer, and a node whose owner takes no orders from others."""
    auth = {"auth": {"enabled": True, "allowed_keys": ["looker"], "admin_keys": ["doer"]}}
    cookbooks = {"atlas": fakes(tmp_path / "a", m={}), "borealis": fakes(tmp_path / "b", m={})}
    each = {"borealis": {"cluster": {"accept_administration": False}}}
    async with running_mesh(tmp_path, cookbooks, auth, each=each, binary_path=FAKE_LLAMA_SERVER) as mesh:

        def use() -> None:
            with browser_page(mesh["atlas"].node.url, expected=("401",)) as page:

                def use_key(key: str) -> None:
                    page.locator("#key-dialog").wait_for()
                    page.locator("#key").fill(key)
                    page.keyboard.press("Enter")

                use_key("looker")
                live(page)
                page.locator("#look-only", has_text="the key key-1 may not administer").wait_for()
                acts = page.locator("[data-act=drain], #matrix-body td.end button")
                page.locator("[data-node=borealis].node").wait_for()
                for button in acts.all():
                    assert button.is_disabled()
                    assert "auth.admin_keys" in str(button.get_attribute("title"))
                page.locator("tr[data-model='m:default'] button.cell").first.click()
                assert page.locator("#sheet").get_by_role("button", name="Load here…").is_disabled()
                assert "may not administer" in page.locator("#sheet-body").inner_text()
                page.keyboard.press("Escape")
                page.locator("#key-button").click()
                use_key("doer")
                page.locator("#look-only").wait_for(state="hidden")
                page.locator("[data-node=atlas] [data-act=drain]:enabled").wait_for()
                drain = page.locator("[data-node=borealis] [data-act=drain]")
                page.locator("[data-node=borealis] [data-act=drain][title*=accept_administration]").wait_for()
                assert drain.is_disabled()

        await look(use)


async def test_the_keyboard_is_enough(tmp_path: Path) -> None:
    """Everything is reached in the order in which it is read, shows that it is, and dialogs keep it."""
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:

        def use() -> None:
            with browser_page(node.url) as page:
                live(page)
                page.locator("[data-act=drain]").wait_for()
                places = []
                for _ in range(60):
                    page.keyboard.press("Tab")
                    found = page.evaluate(FOCUSED)
                    if found["name"] == "BODY":
                        break
                    assert found["outline"] >= 2, f"{found['name']} doesn't show that it has the focus"
                    places.append(found)
                names = [one["name"] for one in places]
                assert names[0] == "Skip to the content"
                wanted = [
                    "key-button",
                    "theme",
                    "Drain…",
                    "model-filter",
                    "log-model",
                    "chat-model",
                    "question",
                ]
                at = [next(i for i, name in enumerate(names) if name.startswith(one)) for one in wanted]
                assert at == sorted(at), names
                # A dialog takes the focus, keeps it, and gives it back.
                page.locator("[data-act=drain]").focus()
                page.keyboard.press("Enter")
                page.locator("#sheet").wait_for()
                assert page.evaluate("document.activeElement.textContent") == "Cancel"
                for _ in range(6):
                    page.keyboard.press("Tab")
                    assert page.evaluate("document.activeElement.matches('body, #sheet *')")
                page.keyboard.press("Escape")
                page.locator("#sheet").wait_for(state="hidden")
                assert page.evaluate("document.activeElement.dataset.act") == "drain"
                # From one dialog to the next.
                page.keyboard.press("Tab")
                page.keyboard.press("Enter")
                page.keyboard.press("Enter")
                page.locator("#sheet-title", has_text="Pause node-a?").wait_for()
                assert page.evaluate("document.activeElement.id") == "pause-time"
                page.keyboard.press("Escape")
                assert page.evaluate("document.activeElement.dataset.act") == "more"

        await look(use)


async def test_what_has_to_be_fetched_is_no_mistake(tmp_path: Path) -> None:
    recipes = fakes(tmp_path, m={})
    recipes["models"] += [
        {"name": "absent", "profiles": [profile(tmp_path / "no.gguf")]},
        {"name": "far", "profiles": [{"id": "default", "hf_repo": "owner/name:Q4_K_M"}]},
    ]
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER, env=env) as node:

        def use() -> None:
            with browser_page(node.url) as page:
                live(page)
                for model, text in (("absent", "file missing"), ("far", "to download")):
                    cell = page.locator(f"tr[data-model='{model}:default'] button.cell")
                    cell.locator(".badge", has_text=text).wait_for()
                cell.click()
                assert "has to be fetched first" in page.locator("#sheet-body").inner_text()
                assert page.locator("#sheet").get_by_role("button", name="Load here…").is_enabled()

        await look(use)
