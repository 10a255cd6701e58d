"""The commands as somebody types them, against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llamesh.config.cookbook import load_cookbook
from tests.support.hub import Hub, running_hub
from tests.support.node import clean_environment

PATIENCE_SECONDS = 30
FILE = "tiny-Q4_K_M.gguf"
NAME = "o/tiny-GGUF:Q4_K_M"


class Place:
    """A folder with a configuration, a cache of its own, and the commands in it."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub
        empty = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
        self.environment = clean_environment({**empty, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf")})

    def call(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `llamesh WORDS`."""
        done = subprocess.run(
            self.command(words),
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    def command(self, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "llamesh", *words]

    def models(self) -> list[dict[str, object]]:
        code, out, _ = self.call("models", "--json")
        assert code == 0
        found = json.loads(out) if out.startswith("[") else []
        assert isinstance(found, list)
        return found


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Iterator[Place]:
    with running_hub() as hub:
        hub.add("o/tiny-GGUF", {FILE: tiny_model.read_bytes()})
        yield Place(tmp_path, hub)


def test_from_nothing_to_a_model(place: Place, tiny_model: Path) -> None:
    code, out, _ = place.call("init", NAME)
    assert code == 0
    assert (
        "wrote config.yaml\nwrote cookbook.yaml\ntiny is in cookbook.yaml: tiny-Q4_K_M.gguf, 303.1 kB" in out
    )
    assert [one.key for one in load_cookbook(place.folder / "cookbook.yaml").profiles] == ["tiny:default"]
    assert place.models() == []
    code, out, _ = place.call("pull")
    assert code == 0
    assert out.startswith(f"{NAME}: 303.1 kB, {place.folder}/hf/hub/models--o--tiny-GGUF/snapshots/")
    [found] = place.models()
    sha256 = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert (found["name"], found["sha256"], found["profiles"]) == (NAME, sha256, ["tiny"])
    assert (found["origin"], found["size"]) == ("download", tiny_model.stat().st_size)
    code, out, _ = place.call("models")
    assert [line.split() for line in out.splitlines()][1][:4] == [NAME, "303.1", "kB", sha256[:12]]
    # It is here: nothing comes again.
    sent = place.hub.sent
    assert place.call("pull", "tiny")[0] == 0
    assert place.hub.sent == sent


def test_init_leaves_what_is_there(place: Place) -> None:
    (place.folder / "config.yaml").write_text("node_id: mine\n")
    code, out, _ = place.call("init", "--models-dir", "models")
    assert (code, "wrote config.yaml" in out, "wrote cookbook.yaml" in out) == (0, False, True)
    assert (place.folder / "config.yaml").read_text() == "node_id: mine\n"
    code, _, err = place.call("init")
    assert code == 1
    assert "config.yaml and cookbook.yaml are there already" in err


def test_what_init_writes_is_a_configuration(place: Place, tiny_model: Path) -> None:
    models = place.folder / "it's mine"
    models.mkdir()
    (models / "local.gguf").write_bytes(tiny_model.read_bytes())
    assert place.call("init", "--models-dir", str(models))[0] == 0
    [found] = place.models()
    assert (found["name"], found["origin"], found["sha256"]) == ("local.gguf", "models_dir", "")
    assert place.call("models", "--hash")[0] == 0
    assert place.models()[0]["sha256"] == hashlib.sha256(tiny_model.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "o/none"], "there is no public repository o/none"),
        (["add", "o/tiny-GGUF:Q2_K"], "o/tiny-GGUF: there is no Q2_K in it; it has Q4_K_M"),
        (["add", "../../etc"], "there is no file"),
        (["pull", "none"], "the cookbook has no model none"),
        (["pull", "o/none"], "there is no public repository o/none"),
        (["pull", "a/b/c"], "not a repository"),
        (["rm", "none", "-y"], "there are no weights called none on this disk"),
        (["models", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_what_cant_be_done_is_said(place: Place, words: list[str], message: str) -> None:
    (place.folder / "cookbook.yaml").write_text("models: []\n")
    code, _, err = place.call(*words)
    assert code == 1
    assert message in err


def test_removing(place: Place) -> None:
    (place.folder / "cookbook.yaml").write_text("models: []\n")
    assert place.call("pull", NAME)[0] == 0
    code, out, err = place.call("rm", NAME)
    assert code == 1
    assert "303.1 kB in " in out
    assert "--yes removes them without a question" in err
    assert len(place.models()) == 1
    for answer, left in (("n", 1), ("y", 0)):
        assert f"remove this? [y/N] {answer}" in typed(place, ["rm", NAME], answer)
        assert len(place.models()) == left
    blobs = place.folder / "hf" / "hub" / "models--o--tiny-GGUF" / "blobs"
    assert list(blobs.iterdir()) == []


def test_a_file_of_one_s_own_isnt_removed(place: Place, tiny_model: Path) -> None:
    (place.folder / "mine.gguf").write_bytes(tiny_model.read_bytes())
    (place.folder / "cookbook.yaml").write_text("models: []\n")
    assert place.call("add", "./mine.gguf")[0] == 0
    for name in ("mine", "mine.gguf"):
        code, _, err = place.call("rm", "-y", name)
        assert code == 1
        assert "is a file of yours" in err
    assert (place.folder / "mine.gguf").exists()


def typed(place: Place, words: list[str], answer: str) -> str:
    """What a terminal shows of a command that asks."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        place.command(words),
        cwd=place.folder,
        env=place.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        os.write(ours, f"{answer}\n".encode())
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other side has closed
                break
            if not piece:
                break
            shown += piece
        process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    # The terminal repeats what is typed, maybe before the question.
    text = shown.decode().replace("\r\n", "\n")
    return text if f"] {answer}" in text else text.replace("[y/N] ", f"[y/N] {answer}")


def test_interrupted_it_goes_on_the_next_time(place: Place) -> None:
    content = os.urandom(3 << 20)
    place.hub.add("o/big", {"big.gguf": content})
    fault = place.hub.fault("big.gguf", stall_after=2 << 20)
    (place.folder / "cookbook.yaml").write_text("models: []\n")
    process = subprocess.Popen(
        place.command(["pull", "o/big"]),
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + PATIENCE_SECONDS
    blobs = place.folder / "hf" / "hub" / "models--o--big" / "blobs"
    while not any(path.stat().st_size == 2 << 20 for path in blobs.glob("*.incomplete")):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "the next time goes on from there" in err
    assert "Traceback" not in err
    sent, fault.stall_after = place.hub.sent, None
    assert place.call("pull", "o/big")[0] == 0
    assert place.hub.sent == len(content)
    assert sent == 2 << 20


def test_a_bar_on_a_terminal(place: Place) -> None:
    (place.folder / "cookbook.yaml").write_text("models: []\n")
    place.hub.fault(FILE, pace=0.15)
    shown = typed(place, ["pull", NAME], "")
    assert "downloading o/tiny-GGUF:Q4_K_M" in shown
    assert f"{NAME}: 303.1 kB, " in shown


def test_offline(place: Place) -> None:
    (place.folder / "cookbook.yaml").write_text("models: []\n")
    assert place.call("pull", NAME)[0] == 0
    seen = len(place.hub.seen)
    assert place.call("pull", NAME, HF_HUB_OFFLINE="1")[0] == 0
    code, _, err = place.call("pull", "o/other:Q8_0", HF_HUB_OFFLINE="1")
    assert code == 1
    assert "HF_HUB_OFFLINE forbids" in err
    assert len(place.hub.seen) == seen
