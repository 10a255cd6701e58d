"""Unpacking archives of others: nothing leaves the folder, nothing grows without bound."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

# Far above llama.cpp's source (200 MB) and its largest release archive (CUDA's libraries, 1.5 GB).
MAX_BYTES = 8 << 30
MAX_ENTRIES = 200_000


def archive_kind(path: Path) -> str | None:
    """`tar` or `zip`, by content; None for anything else."""
    try:
        if tarfile.is_tarfile(path):
            return "tar"
        return "zip" if zipfile.is_zipfile(path) else None
    except OSError:
        return None


def unpack(path: Path, folder: Path) -> None:
    """Unpack `path` into `folder`, which is made. Raises ValueError for a bad archive, OSError."""
    folder.mkdir(parents=True)
    try:
        if archive_kind(path) == "zip":
            _unpack_zip(path, folder)
        else:
            _unpack_tar(path, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _unpack_tar(path: Path, folder: Path) -> None:
    size = 0
    with tarfile.open(path) as archive:
        for number, member in enumerate(archive):
            size += member.size
            _check(number, size)
            # "data": no absolute or climbing names, links that stay inside, no devices, no setuid.
            archive.extract(member, folder, filter="data")


def _unpack_zip(path: Path, folder: Path) -> None:
    root = folder.resolve()
    size = 0
    with zipfile.ZipFile(path) as archive:
        for number, member in enumerate(archive.infolist()):
            size += member.file_size
            _check(number, size)
            mode = member.external_attr >> 16
            target = (root / member.filename).resolve()
            if not target.is_relative_to(root) or "\\" in member.filename:
                raise ValueError(f"{member.filename!r} leads out of the folder")
            if stat.S_ISLNK(mode):
                raise ValueError(f"{member.filename!r} is a link")
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            if mode & 0o100:
                target.chmod(0o755)


def _check(number: int, size: int) -> None:
    if number >= MAX_ENTRIES or size > MAX_BYTES:
        raise ValueError(f"it holds more than {MAX_ENTRIES} entries or {MAX_BYTES >> 30} GiB")
