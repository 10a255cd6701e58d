"""An engine without a compiler: a release of llama.cpp, of a size and sha256 that are known beforehand.

The archives are those of llama.cpp's own releases. `PINS` says which one for which machine; a file with any
other content isn't unpacked. They are made for Ubuntu 24.04 and later (glibc 2.38) and for macOS 13.3 and
later: whether one works on this machine is asked of it before it is used, as of any build.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import trio

from llamesh.core.backends import Machine
from llamesh.core.builds import TARGET
from llamesh.local.builds import machine
from llamesh.local.builds.archives import unpack
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.maker import Made, Progress, try_out
from llamesh.local.builds.record import Build
from llamesh.local.builds.store import Store
from llamesh.local.builds.trial_server import STAGE as TEST

FETCH = "downloading a release of llama.cpp"
UNPACK = "unpacking"

RELEASES = "https://github.com/ggml-org/llama.cpp/releases/download"

_CHUNK_BYTES = 1 << 20
_SILENT_SECONDS = 60.0
_MOST_REDIRECTS = 5

# Beside the archives themselves: what they hold is about three times as large.
_ROOM = 4


@dataclass(frozen=True, slots=True)
class Archive:
    """One file of a release, with its sha256 and its size in bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Pin:
    """What to install for a system ("Linux", "Darwin"), a processor and a backend, into one folder."""

    system: str
    processor: str
    backend: str
    tag: str
    archives: tuple[Archive, ...]


def _pin(system: str, processor: str, backend: str, tag: str, *archives: tuple[str, str, int]) -> Pin:
    return Pin(system, processor, backend, tag, tuple(Archive(*one) for one in archives))


# Names, digests and sizes as the releases' pages give them. CUDA's libraries are an archive of their own.
PINS: tuple[Pin, ...] = (
    _pin("Linux", "x86_64", "cpu", "b11391",
         ("llama-b11391-bin-ubuntu-x64.tar.gz",
          "b620b4143ab92b050e435209d612415c0d3b19d71e6afd60fa6b96458fae891b", 17_637_234)),
    _pin("Linux", "aarch64", "cpu", "b11391",
         ("llama-b11391-bin-ubuntu-arm64.tar.gz",
          "76f0ede98765d74e6d2e02ce8f0f22f4cbed5c4411ebca8594d13c076d0bc7fb", 13_667_865)),
    _pin("Linux", "x86_64", "cuda", "b11391",
         ("llama-b11391-bin-ubuntu-cuda-12.8-x64.tar.gz",
          "3a76d8d1b0f3d558d0de2d060283f2da0afac79a9f68dd1486b987b9fedc5bc5", 171_499_631),
         ("cudart-llama-b11391-bin-ubuntu-cuda-12.8-x64.tar.gz",
          "8cd7789d811ed44d8b5ccc53feb7c1e2a0e3ab92e8e3fc450f43282fb2c81a87", 594_377_794)),
    _pin("Linux", "aarch64", "cuda", "b11391",
         ("llama-b11391-bin-ubuntu-cuda-13.4-arm64.tar.gz",
          "5bca8f1039fef06b8972adc06369044de6e04b155e62d6f91a161623d1a279e1", 147_596_012),
         ("cudart-llama-b11391-bin-ubuntu-cuda-13.4-arm64.tar.gz",
          "3643a1ff6a6dde792b9bf6cf4dcf731b53503355f443f5d0d9ab4f3f4bcd92ab", 552_521_398)),
    _pin("Linux", "x86_64", "vulkan", "b10892",
         ("llama-b10892-bin-ubuntu-vulkan-x64.tar.gz",
          "87975352278b7fa5de25c2cd7454fb0abd62a42375d360e5b33f0e6b9712ac6c", 30_160_971)),
    _pin("Linux", "aarch64", "vulkan", "b10892",
         ("llama-b10892-bin-ubuntu-vulkan-arm64.tar.gz",
          "5084097ef843d0e03bd91eb806e297732be1390b3cc8cdf02480c53cbffe29ba", 24_216_351)),
    _pin("Linux", "x86_64", "hip", "b10892",
         ("llama-b10892-bin-ubuntu-rocm-10.0-x64.tar.gz",
          "e4cdac3961063ff765df1041ec178ba45b702e0b6079fe7a49052ff9a0e7b611", 218_364_636)),
    _pin("Darwin", "arm64", "metal", "b11391",
         ("llama-b11391-bin-macos-arm64.tar.gz",
          "25d2bb54a394de7c75d11d4b4a678f600704349c5e5a5366443f746d862df27a", 11_915_952)),
    _pin("Darwin", "x86_64", "cpu", "b11391",
         ("llama-b11391-bin-macos-x64.tar.gz",
          "6c6b671a6e54fc50b84ea361e9b2861dd98a542784cca4152ad0c6549931917b", 11_466_225)),
)  # fmt: skip

# For `auto`, by the maker of the GPU, the best first. Nothing has to be installed for these but the driver.
_BEST = {
    "nvidia": ("cuda", "vulkan"),
    "amd": ("hip", "vulkan"),
    "intel": ("vulkan",),
    "apple": ("metal", "cpu"),
}


def choose_pin(backend: str, there: Machine, processor: str, pins: Sequence[Pin] = PINS) -> Pin:
    """The release for a machine; `auto` takes the best for its GPU. Raises BuildFailed."""
    fitting = {p.backend: p for p in pins if (p.system, p.processor) == (there.system, processor)}
    wanted = [backend]
    if backend == "auto":
        wanted = [one for maker, several in _BEST.items() if maker in there.gpus for one in several] + ["cpu"]
    for one in wanted:
        if one in fitting:
            return fitting[one]
    there_is = ", ".join(sorted(fitting)) or "none at all"
    raise BuildFailed(
        FETCH,
        f"no release for {backend} on {there.system} {processor} is known (there is: {there_is}); "
        "build it: llamesh build",
    )


async def install(
    store: Store,
    environ: Mapping[str, str],
    progress: Progress,
    *,
    backend: str = "auto",
    pins: Sequence[Pin] = PINS,
    releases: str = RELEASES,
) -> Made:
    """Download, check, unpack, test and make live. Raises BuildFailed; what is live is then as before."""
    try:
        there = await trio.to_thread.run_sync(machine.look, environ)
        pin = choose_pin(backend, there, platform.machine(), pins)
        digest = hashlib.sha256("".join(one.sha256 for one in pin.archives).encode()).hexdigest()
        key = f"{pin.tag}-{pin.backend}-{digest[:8]}"
        progress.commit = progress.key = key
        before = store.live()
        async with store.lock(lambda: progress.enter("waiting for another build")):
            made = store.find(key)
            if made is None:
                made = await _fetch_and_try(pin, key, digest, store, environ, progress, releases)
            store.make_live(key)
        return Made(made, changed=before is None or before.key != key)
    finally:
        progress.enter("")


async def _fetch_and_try(
    pin: Pin,
    key: str,
    digest: str,
    store: Store,
    environ: Mapping[str, str],
    progress: Progress,
    releases: str,
) -> Build:
    started = time.monotonic()
    folder = store.root / f"{key}.download.part"
    _check_room(store.root, sum(one.size for one in pin.archives))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        products = folder / "all"
        for archive in pin.archives:
            progress.enter(FETCH)
            progress.line(f"{archive.name}, {archive.size >> 20} MiB")
            file = folder / archive.name
            await fetch(f"{releases}/{pin.tag}/{archive.name}", archive, file, progress.advance)
            progress.enter(UNPACK)
            await trio.to_thread.run_sync(_unpack_flat, file, products)
            file.unlink()
        progress.enter(TEST)
        program = await trio.to_thread.run_sync(store.stage, key, products)
        if not program.is_file():
            raise BuildFailed(UNPACK, f"the release holds no {TARGET}")
        always, version = await try_out(program, store.root, environ, progress.line)
        build = Build(
            key=key,
            commit=digest[:40],
            version=version,
            source=f"release {pin.tag} for {pin.backend}",
            always=always,
            built_at=time.time(),
            seconds=round(time.monotonic() - started, 1),
        )
        return await trio.to_thread.run_sync(store.add, build)
    except OSError as error:
        raise BuildFailed(progress.stage or FETCH, str(error)) from error
    finally:
        store.discard(key)
        shutil.rmtree(folder, ignore_errors=True)


def _check_room(root: Path, size: int) -> None:
    free = shutil.disk_usage(root).free
    if free < _ROOM * size:
        raise BuildFailed(FETCH, f"{root} has {free >> 20} MiB left, and {_ROOM * size >> 20} MiB are needed")


def _unpack_flat(file: Path, products: Path) -> None:
    """All files of an archive into one folder: a program finds its libraries beside it."""
    part = file.with_name(f"{file.name}.unpacked")
    try:
        unpack(file, part)
    except ValueError as error:
        raise BuildFailed(UNPACK, f"{file.name} can't be unpacked: {error}") from error
    products.mkdir(exist_ok=True)
    for folder, _, names in os.walk(part):
        for name in names:
            os.replace(os.path.join(folder, name), products / name)
    shutil.rmtree(part)


async def fetch(url: str, archive: Archive, target: Path, advance: Callable[[float], None]) -> None:
    """Download a file of known size and sha256. Raises BuildFailed for any other, OSError of the disk.

    Redirects are followed to https only (plain http from loopback to loopback, for tests), and carry nothing.
    """
    import httpx  # only needed here

    digest, size = hashlib.sha256(), 0
    timeout = httpx.Timeout(_SILENT_SECONDS)
    # The system's certificates, and a proxy if the environment names one: this is a request to the world.
    context = ssl.create_default_context()
    try:
        async with httpx.AsyncClient(timeout=timeout, verify=context) as client:
            for _ in range(_MOST_REDIRECTS + 1):
                _check_url(url)
                async with client.stream("GET", url) as reply:
                    if reply.is_redirect:
                        url = str(reply.next_request.url) if reply.next_request is not None else ""
                        continue
                    if reply.status_code != 200:
                        raise BuildFailed(FETCH, f"{url} answers {reply.status_code} {reply.reason_phrase}")
                    with target.open("wb") as file:
                        # Closed at once where it isn't read to its end.
                        body = cast(AsyncGenerator[bytes, None], reply.aiter_raw(_CHUNK_BYTES))
                        async with contextlib.aclosing(body) as chunks:
                            async for chunk in chunks:
                                size += len(chunk)
                                if size > archive.size:
                                    break
                                await trio.to_thread.run_sync(file.write, chunk)
                                digest.update(chunk)
                                advance(size / archive.size)
                break
            else:
                raise BuildFailed(FETCH, f"{url} leads on and on")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BuildFailed(FETCH, f"{url} can't be read: {error or type(error).__name__}") from error
    if size != archive.size:
        larger = "more than" if size > archive.size else f"{size} of"
        raise BuildFailed(
            FETCH, f"{archive.name} isn't what it should be: {larger} {archive.size} bytes came"
        )
    if digest.hexdigest() != archive.sha256:
        raise BuildFailed(
            FETCH,
            f"{archive.name} isn't what it should be: its sha256 is {digest.hexdigest()} instead of "
            f"{archive.sha256}",
        )


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1")):
        return
    raise BuildFailed(FETCH, f"it leads to {url[:200]}, which isn't https")
