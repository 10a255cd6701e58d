"""`models_dir`: which files are models, and what they are called."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import trio

from llamesh.config.cookbook import ModelPath
from llamesh.config.store import Change, Files, Store
from llamesh.local.weights import folder as module
from llamesh.local.weights.folder import ModelsFolder
from tests.support.gguf_bytes import STRING, U32, gguf, key

OLD = 1_000_000_000


def put(path: Path, source: Path | bytes) -> Path:
    """A file that came to rest long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        shutil.copy(source, path)
    os.utime(path, (OLD, OLD))
    return path


def store_in(folder: Path, cookbook: str = "models: []\n") -> Store:
    (folder / "cookbook.yaml").write_text(cookbook)
    return Store(Files(folder / "config.yaml", folder / "cookbook.yaml", folder / "secrets.yaml"), {})


def scanned(tmp_path: Path, models: Path) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    return {
        profile.model: (str(profile.source.path), profile.kind, profile.arguments)
        for profile in ModelsFolder(store_in(tmp_path), models).scan()
        if isinstance(profile.source, ModelPath)
    }


def test_every_model_has_the_name_of_its_file(tmp_path: Path, tiny_model: Path) -> None:
    models = tmp_path / "models"
    one = put(models / "One-Q8_0.gguf", tiny_model)
    two = put(models / "deep" / "er" / "Two: of (them).gguf", tiny_model)
    same = put(models / "other" / "one-q8_0.gguf", tiny_model)
    put(models / ".hidden" / "three.gguf", tiny_model)
    put(models / "readme.txt", b"no model")
    put(models / "broken.gguf", b"no model")
    put(models / "mmproj-one.gguf", tiny_model)
    put(models / "half-00001-of-00002.gguf", tiny_model)
    put(models / "late-00002-of-00002.gguf", tiny_model)
    shutil.copy(tiny_model, models / "fresh.gguf")  # it may still be on its way
    assert scanned(tmp_path, models) == {
        "One-Q8_0": (str(one), "text", ()),
        "Two-of-them": (str(two), "text", ()),
        "other-one-q8_0": (str(same), "text", ()),
    }


def test_a_projector_belongs_to_the_only_model_beside_it(tmp_path: Path, tiny_model: Path) -> None:
    model = put(tmp_path / "models" / "v" / "vision.gguf", tiny_model)
    projector = put(tmp_path / "models" / "v" / "mmproj-F16.gguf", b"GGUF")
    expected = (str(model), "text", ("--mmproj", str(projector)))
    assert scanned(tmp_path, tmp_path / "models") == {"vision": expected}


@pytest.mark.parametrize(
    ("pooling", "kind", "arguments"),
    [(0, "text", ()), (1, "embedding", ("--embedding",)), (4, "rerank", ("--reranking",))],
)
def test_the_file_says_what_it_is_for(
    tmp_path: Path, pooling: int, kind: str, arguments: tuple[str, ...]
) -> None:
    path = put(
        tmp_path / "models" / "bert.gguf",
        gguf(
            [
                key("general.architecture", STRING, "bert"),
                key("bert.block_count", U32, 1),
                key("bert.pooling_type", U32, pooling),
            ]
        ),
    )
    assert scanned(tmp_path, tmp_path / "models") == {"bert": (str(path), kind, arguments)}


def test_no_folder_no_models(tmp_path: Path) -> None:
    assert scanned(tmp_path, tmp_path / "none") == {}


async def test_what_comes_and_goes_is_published(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    models = tmp_path / "models"
    written = put(models / "written.gguf", tiny_model)
    text = f"models:\n- name: Taken\n  profiles:\n  - id: default\n    model_path: {written}\n"
    store = store_in(tmp_path, text)
    changes: list[Change] = []
    store.on_change = changes.append
    put(models / "taken.gguf", tiny_model)

    def keys() -> list[str]:
        return [profile.key for profile in store.current.cookbook.profiles]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ModelsFolder(store, models).run)
        found = put(models / "found.gguf", tiny_model)
        await until(lambda: keys() == ["Taken:default", "found:default"])
        # A reload of the files keeps what was found.
        (tmp_path / "cookbook.yaml").write_text(text.replace("Taken", "Other"))
        await store.reload()
        await until(lambda: keys() == ["Other:default", "found:default", "taken:default"])
        found.unlink()
        await until(lambda: keys() == ["Other:default", "taken:default"])
        nursery.cancel_scope.cancel()
    assert ("found:default",) in [change.added for change in changes]
    assert changes[-1].removed == ("found:default",)


async def test_a_folder_that_hangs_holds_up_nobody(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)
    store, models = store_in(tmp_path), tmp_path / "models"
    put(models / "m.gguf", tiny_model)
    away, back, asked = threading.Event(), threading.Event(), []
    real = module._files

    def files(folder: Path) -> object:
        asked.append(folder)
        if away.is_set():
            back.wait(60)
        return real(folder)

    monkeypatch.setattr(module, "_files", files)
    one = ModelsFolder(store, models)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await until(lambda: len(store.current.cookbook.profiles) == 1)
        away.set()
        await until(lambda: one._silent)
        count = len(asked)
        await trio.sleep(0.1)
        assert len(asked) == count, "another thread was sent after the one that hangs"
        assert len(store.current.cookbook.profiles) == 1
        (models / "m.gguf").unlink()
        away.clear()
        back.set()
        await until(lambda: not store.current.cookbook.profiles)
        nursery.cancel_scope.cancel()


async def until(condition: object) -> None:
    assert callable(condition)
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.005)
