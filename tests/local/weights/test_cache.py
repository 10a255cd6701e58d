"""The hub's cache as huggingface-hub lays it out, and our notes in it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from llamesh.config.cookbook import HubFile, ModelPath, Profile, UrlFile
from llamesh.core.model_files import RemoteFile
from llamesh.local.weights.cache import Cache, Record, find_cache
from llamesh.local.weights.wanted import Found, Wanted, wanted_of, with_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache: Cache, repo: str, name: str, content: bytes) -> RemoteFile:
    """A file of a repository, as a download leaves it."""
    file = RemoteFile(name, len(content), sha256=hashlib.sha256(content).hexdigest())
    blob = cache.blob(repo, file.digest)
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    cache.publish(repo, COMMIT, file)
    cache.note_main(repo, COMMIT)
    return file


def record_of(cache: Cache, wanted: Wanted, *, ours: bool = True) -> Record:
    found = cache.look(wanted)
    assert found is not None
    return replace(found, parts=tuple(replace(file, ours=ours) for file in found.parts))


def test_it_lies_where_the_hub_s_own_library_looks(cache: Cache) -> None:
    put(cache, "o/n", "sub/m-Q8_0.gguf", b"content")
    assert cache.folder("o/n").name == repo_folder_name(repo_id="o/n", repo_type="model")
    found = try_to_load_from_cache("o/n", "sub/m-Q8_0.gguf", cache_dir=cache.hub)
    assert isinstance(found, str)
    assert Path(found).read_bytes() == b"content"
    assert not os.path.isabs(os.readlink(found))
    info = scan_cache_dir(cache.hub)
    assert info.warnings == []
    assert info.size_on_disk == 7


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"HF_HOME": "~/x"},
        {"XDG_CACHE_HOME": "/c"},
        {"HF_HUB_CACHE": "/h", "HF_HOME": "/x"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_ASSETS_CACHE": "/a"},
    ],
)
def test_the_folder_is_the_one_that_the_library_would_choose(names: dict[str, str]) -> None:
    import subprocess
    import sys

    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_"))}
    program = "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE); print(c.HF_ASSETS_CACHE)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**clean, **names}, capture_output=True, text=True, check=True
    )
    hub, assets = done.stdout.splitlines()
    found = find_cache(names)
    assert (str(found.hub), str(found.own)) == (hub, f"{assets}/llamesh")


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_offline(value: str, *, offline: bool) -> None:
    assert find_cache({"HF_HUB_OFFLINE": value}).offline is offline
    assert constants is not None


def test_what_others_fetched_is_found(cache: Cache) -> None:
    put(cache, "o/n", "m-Q8_0.gguf", b"content")
    put(cache, "o/n", "mmproj-m.gguf", b"projector")
    for source in (HubFile("o/n:Q8_0", None), HubFile("o/n", "m-Q8_0.gguf")):
        found = cache.look(Wanted(source))
        assert found is not None
        assert found.found == Found(str(cache.pointer("o/n", COMMIT, "m-Q8_0.gguf")))
        assert not found.parts[0].ours
        with_projector = cache.look(Wanted(source, projector=True))
        assert with_projector is not None
        assert with_projector.found.projector == str(cache.pointer("o/n", COMMIT, "mmproj-m.gguf"))
    assert cache.look(Wanted(HubFile("o/n:Q4_0", None))) is None
    assert cache.look(Wanted(HubFile("o/other:Q8_0", None))) is None
    assert cache.look(Wanted(UrlFile("https://x/y.gguf", "0" * 64))) is None


def test_the_usual_quantisation_is_for_the_hub_to_say(cache: Cache) -> None:
    put(cache, "o/n", "m-Q8_0.gguf", b"content")
    wanted = Wanted(HubFile("o/n", None))
    assert cache.look(wanted) is None
    offline = replace(cache, offline=True)
    assert offline.look(wanted) is not None


def test_a_split_model_is_there_when_all_of_it_is(cache: Cache) -> None:
    wanted = Wanted(HubFile("o/n:Q8_0", None))
    put(cache, "o/n", "m-Q8_0-00001-of-00002.gguf", b"one")
    assert cache.look(wanted) is None
    put(cache, "o/n", "m-Q8_0-00002-of-00002.gguf", b"two")
    found = cache.look(wanted)
    assert found is not None
    assert [file.size for file in found.parts] == [3, 3]
    assert found.found.model.endswith("00001-of-00002.gguf")


def test_a_note_is_kept_and_believed_only_while_it_is_true(cache: Cache) -> None:
    put(cache, "o/n", "m-Q8_0.gguf", b"content")
    wanted = Wanted(HubFile("o/n:Q8_0", None))
    record = record_of(cache, wanted)
    cache.note(record)
    again = cache.record(wanted.key)
    assert again is not None
    assert replace(again, used=0.0) == record
    assert [one.key for one in cache.records()] == [wanted.key]
    cache.blob("o/n", record.parts[0].sha256).write_bytes(b"shorter")
    assert cache.look(wanted) is not None  # by its size it is the same
    cache.blob("o/n", record.parts[0].sha256).unlink()
    assert cache.look(wanted) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": []}', '{"parts": [{"name": 1}]}', "\xff"])
def test_a_broken_note_is_none(cache: Cache, text: str) -> None:
    (cache.own / "records").mkdir(parents=True)
    (cache.own / "records" / "k.json").write_text(text, encoding="latin-1")
    assert cache.record("k") is None
    assert list(cache.records()) == []


@pytest.mark.parametrize("commit", ["", "main", "../../../../etc", "0" * 39, "\0" * 40])
def test_a_reference_that_leads_elsewhere_is_none(cache: Cache, commit: str) -> None:
    put(cache, "o/n", "m-Q8_0.gguf", b"content")
    (cache.folder("o/n") / "refs" / "main").write_text(commit)
    assert cache.snapshot("o/n") == ("", [])


def test_removing_a_model_keeps_what_another_one_needs(cache: Cache) -> None:
    put(cache, "o/n", "m-Q8_0.gguf", b"content")
    put(cache, "o/n", "mmproj-m.gguf", b"projector")
    plain, seeing = Wanted(HubFile("o/n:Q8_0", None)), Wanted(HubFile("o/n:Q8_0", None), projector=True)
    records = [record_of(cache, wanted) for wanted in (plain, seeing)]
    for record in records:
        cache.note(record)
    assert cache.remove(records[1]) == len(b"projector")
    assert cache.look(plain) is not None
    assert cache.remove(records[0]) == len(b"content")
    assert [path for path in cache.hub.rglob("*") if path.is_file() and "refs" not in path.parts] == []
    assert list(cache.records()) == []


def test_what_somebody_else_fetched_isnt_ours_to_remove(cache: Cache) -> None:
    put(cache, "o/n", "m-Q8_0.gguf", b"content")
    wanted = Wanted(HubFile("o/n:Q8_0", None))
    record = record_of(cache, wanted, ours=False)
    assert cache.remove(record, only_ours=True) == 0
    assert cache.look(wanted) is not None


def profile(source: HubFile | UrlFile | ModelPath, *arguments: str, kind: str = "text") -> Profile:
    return Profile("m", "default", "", "", source, arguments, kind)  # type: ignore[arg-type]


def test_what_a_profile_wants() -> None:
    hub, web = HubFile("o/n:Q8_0", None), UrlFile("https://x/y.gguf?key=secret", "0" * 64)
    assert wanted_of(profile(ModelPath("/m"))) is None
    assert wanted_of(profile(hub)) == Wanted(hub, projector=True)
    assert wanted_of(profile(hub, kind="embedding")) == Wanted(hub)
    for flag in ("--no-mmproj", "--no_mmproj", "--mmproj"):
        assert wanted_of(profile(hub, flag)) == Wanted(hub)
    wanted = wanted_of(profile(web))
    assert wanted is not None
    assert wanted.name == "https://x/y.gguf"
    assert Wanted(HubFile("o/n:Q8_0", "sub/f.gguf")).name == "o/n/sub/f.gguf"
    keys = {
        Wanted(hub).key,
        Wanted(hub, projector=True).key,
        Wanted(web).key,
        Wanted(HubFile("o/n", None)).key,
    }
    assert len(keys) == 4


def test_a_profile_with_its_weights() -> None:
    found = with_weights(profile(HubFile("o/n", None), "-c", "9"), Found("/m", "/p"))
    assert (found.source, found.arguments) == (ModelPath("/m"), ("-c", "9", "--mmproj", "/p"))
