"""The doctor's look at files: configuration, keys, room on the disk, weights."""

from __future__ import annotations

import os
import pwd
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import trio

from llamesh.commands.check.look import find_weights
from llamesh.commands.doctor.finding import Finding, Patient, bad, ok, warn
from llamesh.config.cookbook import Profile
from llamesh.config.settings import Settings
from llamesh.local.weights import find_cache
from llamesh.mesh.key_files import IdentityError, check_directory, read_private
from llamesh.mesh.key_store import KeyStore

_GIB = 1 << 30
# Less than that, and the next download or log may be the last one; a usual model has some gigabytes.
_LITTLE = 1 * _GIB
_SOME = 10 * _GIB

# Nobody reads more mistakes at a time.
_MOST = 20

_LOOK_SECONDS = 2.0
_LOOKS_AT_ONCE = 20


async def look_at_files(patient: Patient) -> list[Finding]:
    """Configuration, keys and the disk."""
    return await trio.to_thread.run_sync(_blocking, patient, abandon_on_cancel=True)


def _blocking(patient: Patient) -> list[Finding]:
    return [*_configuration(patient), *_keys(patient), *_places(patient)]


def _configuration(patient: Patient) -> Iterator[Finding]:
    for mistake in patient.mistakes[:_MOST]:
        yield bad(mistake, "mend it; `llamesh check` says more")
    files, settings = patient.files, patient.settings
    if settings is not None:
        there = files.config.exists()
        yield ok(f"{files.config} is fine" if there else "there is no config.yaml: every default holds")
        readable = (_readable_keys(settings, name) for name in ("allowed_keys", "admin_keys"))
        yield from dict.fromkeys(finding for findings in readable for finding in findings)
    if patient.cookbook is not None:
        yield ok(f"{files.cookbook} is fine: {_profiles(len(patient.cookbook.profiles))}")


def _profiles(count: int) -> str:
    return f"{count} profile" if count == 1 else f"{count} profiles"


def _readable_keys(settings: Settings, name: str) -> Iterator[Finding]:
    """A file with keys in it, which others can read."""
    path = Path(settings.origin("auth", name).file)
    keys = getattr(settings.auth, name)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, ValueError):  # it is a variable's name
        return
    # Of a hash, nobody can make the key.
    if mode & 0o004 and any(not _text(key).startswith("sha256:") for key in keys):
        yield warn(f"others can read the keys in {path} (mode {mode:04o})", f"chmod 600 {path}")


def _text(key: object) -> str:
    """The text of a key, whatever it is kept in, to look at its form only."""
    return str(getattr(key, "get_secret_value", lambda: key)())


def _keys(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    if settings is None:
        return
    tls = settings.server_tls
    if tls.enabled and tls.key_path is not None and tls.key_path.exists():
        mode = stat.S_IMODE(tls.key_path.stat().st_mode)
        if mode & 0o004:
            yield warn(f"anybody can read the TLS key {tls.key_path}", f"chmod o-r {tls.key_path}")
    store = KeyStore(settings, patient.environ)
    if not store.directory.exists():
        if settings.cluster.enabled:
            yield ok(f"{store.directory} is made at the first start, with a key and a token")
        return
    if (owner := other_owner(store.directory)) is not None:
        yield warn(
            f"{store.directory} belongs to {owner}, not to the user who runs this",
            f"look as that user: sudo -u {owner} llamesh doctor",
        )
        return
    wrong = False
    secrets = (store.key_path, store.previous_key_path, store.token_path, store.previous_token_path)
    for path in (store.directory, *secrets):
        try:
            if path is store.directory:
                check_directory(path)
            else:
                read_private(path)
        except IdentityError as error:
            wrong = True
            yield bad(f"{error.path}: {error.problem}", error.remedy)
    if not wrong:
        yield ok(f"only this user can read the keys in {store.directory}")


def other_owner(folder: Path) -> str | None:
    """The user whose folder it is, None when it is ours: a service's own, mostly."""
    try:
        number = folder.stat().st_uid
    except OSError:
        return None
    if number == os.geteuid():
        return None
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"#{number}"


def _places(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    if settings is None:
        return
    cache = find_cache(patient.environ)
    fetches = patient.cookbook is not None and any(
        type(profile.source).__name__ in ("HubFile", "UrlFile") for profile in patient.cookbook.profiles
    )
    yield _room(cache.hub, "downloads", fetches)
    if settings.logging.enabled:
        folder = settings.logging.directory
        if _writable(folder):
            yield ok(f"logs can be written to {folder}")
        else:
            yield bad(f"logging.directory {folder} can't be written", f"make it this user's: chown, {folder}")
    if not _writable(settings.metrics_path.absolute().parent):
        place = settings.metrics_path.absolute().parent
        yield warn(
            f"metrics_path {settings.metrics_path} can't be written: nothing is learned over restarts",
            f"let this user write to {place}, or set metrics_path",
        )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _writable(folder: Path) -> bool:
    return os.access(_existing(folder), os.W_OK | os.X_OK)


def _room(folder: Path, use: str, wanted: bool) -> Finding:
    place = _existing(folder)
    try:
        free = psutil.disk_usage(str(place)).free
    except OSError as error:
        return warn(f"the room for {use} in {folder} can't be told: {error.strerror}")
    text = f"{free / _GIB:.1f} GiB are free for {use} in {folder}"
    remedy = "`llamesh rm` removes weights, disk_budget_gb limits them, HF_HOME puts them elsewhere"
    if free < _LITTLE:
        return bad(text, remedy) if wanted else warn(text, remedy)
    return warn(text, remedy) if wanted and free < _SOME else ok(text)


async def look_at_weights(patient: Patient) -> list[Finding]:
    """The model files that profiles name."""
    if patient.settings is None or patient.cookbook is None:
        return []
    cache, here = find_cache(patient.environ), Counter[str]()
    # In a mesh, another node may have the file.
    say = warn if patient.settings.cluster.enabled else bad
    # Of their own: threads that hang at a disk that is away mustn't be missing elsewhere.
    threads = trio.CapacityLimiter(_LOOKS_AT_ONCE)
    problems: dict[str, str] = {}

    async def look(profile: Profile) -> None:
        _, weights = await find_weights(profile, cache, _LOOK_SECONDS, threads)
        here[weights.state] += 1
        problems[profile.key] = weights.problem

    async with trio.open_nursery() as nursery:
        for profile in patient.cookbook.profiles:
            nursery.start_soon(look, profile)
    found = [
        say(f"{profile.key}: {problem}", "correct model_path, or bring the file there")
        for profile in patient.cookbook.profiles
        if (problem := problems[profile.key])
    ]
    if here["here"]:
        found.append(ok(f"the weights of {_profiles(here['here'])} are here"))
    if later := here["download"] + here["engine"]:
        found.append(ok(f"those of {later} are fetched when they are first asked for"))
    return found
