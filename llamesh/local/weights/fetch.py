"""Have the files of a model on this disk: found, or fetched from where they are.

    found = await Fetcher(cache).obtain(wanted, progress)

The steps, each of which may find that nothing is left to do: look at the disk; ask the hub what the files
are; see that there is room; fetch one file after the other, each under its lock; show them in the cache;
note it. What blocks is done in threads, and a disk that doesn't answer is left alone after a while.
"""

from __future__ import annotations

import contextlib
import shutil
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import trio

from llamesh.config.cookbook import HubFile, UrlFile
from llamesh.config.model_names import split_repo
from llamesh.core.model_files import Choice, NoSuchModel, RemoteFile, choose
from llamesh.local.weights import digest
from llamesh.local.weights.cache import Cache, Record, Stored
from llamesh.local.weights.download import CONNECTIONS, FIRST_PAUSE, Download
from llamesh.local.weights.errors import (
    DiskFull,
    NotFound,
    Offline,
    Stopped,
    TooSlow,
    Unreachable,
    Unusable,
    WeightsError,
    WrongContent,
)
from llamesh.local.weights.hub import Listing, list_repo
from llamesh.local.weights.lock import FileLock
from llamesh.local.weights.part import Part, bytes_there
from llamesh.local.weights.progress import Progress, in_words
from llamesh.local.weights.several import Several, Sources
from llamesh.local.weights.source import Neighbours, Source
from llamesh.local.weights.wanted import Wanted
from llamesh.local.weights.web_source import WebSource
from llamesh.telemetry.logs import get_logger

log = get_logger("weights")

T = TypeVar("T")

# A disk gets so long for what takes milliseconds.
_DISK_SECONDS = 20.0
_ASK_SECONDS = 45.0
_STOP_SECONDS = 5.0

_LOCK_SECONDS = 0.2
_SAMPLE_SECONDS = 0.25

# Left on the disk for others.
SPARE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class _Job:
    """One file to fetch: where from, what it must be, and where to."""

    file: RemoteFile
    target: Path
    lock: Path
    web: Callable[[], Source] | None  # None: nobody but peers can be asked


class Fetcher:
    """See the module. One for each node or command; any number of models at once."""

    def __init__(
        self,
        cache: Cache,
        *,
        make_room: Callable[[int], None] = lambda size: None,
        context: ssl.SSLContext | None = None,
        connections: int = CONNECTIONS,
        first_pause: float = FIRST_PAUSE,
        free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        """`make_room(bytes)` is called in a thread before that much is fetched, and may raise WeightsError;
        the rest is for tests.
        """
        self.cache = cache
        self.neighbours: Neighbours | None = None
        self._make_room = make_room
        self._context = context
        self._connections = connections
        self._first_pause = first_pause
        self._free = free

    async def look(self, wanted: Wanted) -> Record | None:
        """The weights, when they are on this disk. Raises WeightsError when the disk doesn't answer."""
        return await self._on_disk(partial(self.cache.look, wanted))

    async def obtain(self, wanted: Wanted, progress: Progress, *, fresh: bool = False) -> Record:
        """Have the weights on this disk. `fresh`: as the hub has them now, whatever is here. Raises
        WeightsError.

        Cancelled, it stops the download within seconds; what has come stays.
        """
        record = None if fresh and not self.cache.offline else await self.look(wanted)
        if record is None:
            if isinstance(wanted.source, UrlFile):
                record = await self._from_web(wanted, wanted.source, progress)
            else:
                record = await self._from_hub(wanted, wanted.source, progress)
        await self._on_disk(partial(self.cache.note, record))
        return record

    async def _from_hub(self, wanted: Wanted, source: HubFile, progress: Progress) -> Record:
        repo, quant = split_repo(source.repo)
        listing, choice = await self._choose(wanted, repo, source.file, quant)
        jobs = [self._hub_job(listing, file) for file in choice.files]
        ours = await self._fetch_all(jobs, progress)

        def publish() -> tuple[Stored, ...]:
            stored = [self.cache.publish(repo, listing.commit, job.file) for job in jobs]
            self.cache.note_main(repo, listing.commit)
            return tuple(replace(file, ours=mine) for file, mine in zip(stored, ours, strict=True))

        stored = await self._on_disk(publish)
        count = len(choice.parts)
        projector = stored[count] if choice.projector else None
        return Record(wanted.key, wanted.name, repo, listing.commit, stored[:count], projector)

    async def _choose(
        self, wanted: Wanted, repo: str, file: str | None, quant: str | None
    ) -> tuple[Listing, Choice]:
        """What the files are: by the hub, or by the peers where the hub can't be asked."""
        choosing = partial(choose, file=file, quant=quant, projector=wanted.projector)
        try:
            self._check_online(wanted)
            listing = await self._in_thread(
                partial(list_repo, repo), _ASK_SECONDS, TooSlow(f"{repo}: the hub is silent")
            )
        except (Offline, Unreachable, TooSlow) as error:
            for commit, files in await self.neighbours.listings(repo) if self.neighbours is not None else ():
                with contextlib.suppress(NoSuchModel):
                    choice: Choice = choosing(files)
                    log.warning(
                        "the hub can't be asked: peers say what the files are", repo=repo, problem=str(error)
                    )
                    return Listing(repo, commit, files, "", None), choice
            raise
        try:
            return listing, choosing(listing.files)
        except NoSuchModel as error:
            raise NotFound(f"{repo}: {error}") from None

    def _check_online(self, wanted: Wanted) -> None:
        if self.cache.offline:
            raise Offline(
                f"{wanted.name} isn't on this machine, and HF_HUB_OFFLINE forbids to ask for it: "
                "unset that, or fetch it with `llamesh pull` while it is unset"
            )

    def _hub_job(self, listing: Listing, file: RemoteFile) -> _Job:
        def source() -> WebSource:
            return WebSource(
                listing.url(file),
                file.size,
                token=listing.token,
                what=f"{listing.repo}/{file.name}",
                context=self._context,
                refusal=listing.refusal(),
            )

        cache = self.cache
        target, lock = cache.blob(listing.repo, file.digest), cache.lock(listing.repo, file.digest)
        return _Job(file, target, lock, source if listing.endpoint else None)

    async def _from_web(self, wanted: Wanted, source: UrlFile, progress: Progress) -> Record:
        target = self.cache.web_file(source)
        online = True
        try:
            self._check_online(wanted)
            size = await self._in_thread(
                WebSource(source.url, 0, what=wanted.name, context=self._context).channel().size,
                _ASK_SECONDS,
                TooSlow(f"{wanted.name}: {urlsplit(source.url).hostname} is silent"),
            )
        except (Offline, Unreachable, TooSlow):
            having = await self.neighbours.having(source.sha256) if self.neighbours is not None else []
            if not having:
                raise
            size, online = having[0].size, False
        file = RemoteFile(target.name, size, sha256=source.sha256)

        def web() -> WebSource:
            return WebSource(source.url, size, what=wanted.name, context=self._context)

        job = _Job(file, target, self.cache.web_lock(source), web if online else None)
        await self._fetch_all([job], progress)
        stored = Stored(file.name, str(target), str(target), size, source.sha256, ours=True)
        return Record(wanted.key, wanted.name, "", "", (stored,))

    async def _fetch_all(self, jobs: list[_Job], progress: Progress) -> list[bool]:
        """Fetch what isn't there; of each file, whether it was fetched here."""
        progress.total = sum(job.file.size for job in jobs)
        done, ours = 0, []
        for job in jobs:
            mine = await self._fetch(job, progress, done)
            ours.append(mine)
            done += job.file.size
            progress.sample(trio.current_time(), done)
        return ours

    async def _fetch(self, job: _Job, progress: Progress, done: int) -> bool:
        lock = FileLock(job.lock)
        try:
            while not await self._on_disk(lock.try_lock, lambda _: lock.release()):
                # Somebody else on this disk fetches it: theirs is ours.
                progress.doing = "waiting for another program that downloads"
                there = await self._on_disk(partial(bytes_there, job.target))
                progress.sample(trio.current_time(), done + there)
                await trio.sleep(_LOCK_SECONDS)
            progress.doing = "downloading"
            if await self._on_disk(partial(_is_there, job)):
                return False
            await self._from_anybody(job, progress, done)
            return True
        finally:
            lock.release()

    async def _from_anybody(self, job: _Job, progress: Progress, done: int) -> None:
        """From peers that have it, and from the web; without whoever gave what is wrong."""
        sha256, neighbours = job.file.sha256, self.neighbours
        peers = await neighbours.having(sha256) if sha256 and neighbours is not None else []
        sources = Sources([peer for peer in peers if peer.size == job.file.size], job.web)
        while (source := sources.next()) is not None:
            part = await self._on_disk(partial(self._prepare, job), Part.close)
            try:
                await self._download(job, source, part, progress, done)
                return
            except WrongContent as error:
                wrong = sources.blame(source)
                if not wrong or not sources.left or neighbours is None or not sha256:
                    raise
                neighbours.distrust(wrong, sha256)
                log.warning(
                    "peers gave wrong weights", file=job.file.name, of=sorted(wrong), problem=str(error)
                )
        raise Unreachable(f"{job.file.name}: the hub can't be asked, and no peer has it any more")

    def _prepare(self, job: _Job) -> Part:
        """The part to fill. In a thread."""
        try:
            job.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unusable(f"{job.target.parent} can't be made: {error.strerror}") from None
        part = Part(job.target, job.file.size)
        try:
            left = job.file.size - part.ranges.total
            self._make_room(left)
            free = self._free(job.target.parent)
            if left + SPARE_BYTES > free:
                raise DiskFull(
                    f"{job.file.name} needs {in_words(left)} more, and {in_words(SPARE_BYTES)} stay free for "
                    f"others; {job.target.parent} has {in_words(free)}: free some, or name another folder in "
                    "HF_HUB_CACHE"
                )
        except BaseException:
            part.close()
            raise
        return part

    async def _download(self, job: _Job, source: Source, part: Part, progress: Progress, done: int) -> None:
        file = job.file

        def make_digest(state: str | None) -> digest.Digest:
            return digest.sha256(state) if file.sha256 else digest.git_sha1(file.size)

        download = Download(
            source,
            part,
            make_digest,
            expected=file.digest,
            what=progress.name,
            connections=min(self._connections, source.connections)
            if isinstance(source, Several)
            else self._connections,
            first_pause=self._first_pause,
        )
        started, ended = threading.Event(), threading.Event()

        def run() -> None:
            started.set()
            try:
                download.run()
            finally:
                part.close()
                ended.set()

        async def watch() -> None:
            while True:
                progress.sample(trio.current_time(), done + download.have)
                await trio.sleep(_SAMPLE_SECONDS)

        log.info("downloading", file=file.name, bytes=file.size, there=part.ranges.total, source=source.name)
        began, error = trio.current_time(), None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                try:
                    await trio.to_thread.run_sync(
                        run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
                    )
                except (WeightsError, Stopped) as problem:
                    error = problem
                nursery.cancel_scope.cancel()
        finally:
            download.stop()
            if started.is_set():
                # The lock is ours until nothing is written any more; a disk that hangs isn't waited for.
                with trio.CancelScope(shield=True), trio.move_on_after(_STOP_SECONDS):
                    await trio.to_thread.run_sync(partial(ended.wait, _STOP_SECONDS), abandon_on_cancel=True)
            else:
                part.close()
        if error is not None:
            raise error
        log.info("downloaded", file=file.name, bytes=file.size, seconds=round(trio.current_time() - began, 2))

    async def _on_disk(self, work: Callable[[], T], dispose: Callable[[T], None] | None = None) -> T:
        late = Unusable(f"the disk of {self.cache.hub} doesn't answer")
        return await self._in_thread(work, _DISK_SECONDS, late, dispose)

    @staticmethod
    async def _in_thread(
        work: Callable[[], T],
        seconds: float,
        late: Exception,
        dispose: Callable[[T], None] | None = None,
    ) -> T:
        """What `work` returns; `late` is raised when that takes longer than so many seconds. `dispose`: what
        to do with what it returns when nobody waits for that any more.
        """
        guard, results, left = threading.Lock(), list[T](), threading.Event()

        def in_thread() -> T:
            result = work()
            with guard:
                results.append(result)
                if left.is_set() and dispose is not None:
                    dispose(result)
            return result

        taken = False
        try:
            with trio.move_on_after(seconds):
                result = await trio.to_thread.run_sync(in_thread, abandon_on_cancel=True, limiter=_threads())
                taken = True
                return result
            raise late
        finally:
            if not taken:
                with guard:
                    left.set()
                    if results and dispose is not None:
                        dispose(results[0])


_limiter = trio.lowlevel.RunVar[trio.CapacityLimiter]("llamesh.weights.threads")


def _threads() -> trio.CapacityLimiter:
    """Threads of our own: those that hang must not be missing elsewhere."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(16)
        _limiter.set(limiter)
        return limiter


def _is_there(job: _Job) -> bool:
    """In a thread. Raises WeightsError."""
    try:
        if job.target.stat().st_size == job.file.size:
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unusable(f"{job.target} can't be read: {error.strerror}") from None
    raise WrongContent(f"{job.target} has another size than it should: remove it")
