"""Where the source comes from, and which names are refused."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llamesh.local.builds.archives import unpack
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.git_source import GitSource
from llamesh.local.builds.source import (
    ArchiveSource,
    FolderSource,
    check_reference,
    check_repository,
    source_of,
)
from llamesh.local.builds.tools import hide_credentials
from tests.support.fake_project import FakeProject


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/ggml-org/llama.cpp",
        "https://user:word@example.org/llama.cpp.git",
        "ssh://git@example.org/llama.cpp",
        "git@example.org:ggml-org/llama.cpp.git",
        "file:///srv/llama.cpp",
        "http://127.0.0.1:8000/llama.cpp",
        "http://localhost/llama.cpp",
    ],
)
def test_names_of_repositories(url: str) -> None:
    check_repository(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "option"),
        ("--upload-pack=touch /tmp/x", "option"),
        ("-oProxyCommand=x", "option"),
        ("ext::sh -c 'touch /tmp/x'", "blanks"),
        ("ext::sh%20-c", "any program"),
        ("fd::17", "any program"),
        ("http::https://example.org", "any program"),
        ("http://example.org/llama.cpp", "isn't protected"),
        ("git://example.org/llama.cpp", "isn't protected"),
        ("ftp://example.org/llama.cpp", "isn't protected"),
        ("https://[::1/llama.cpp", "no url"),
        ("ssh://-oProxyCommand=x/y", "option"),
        ("git@example.org:-x", "option"),
        ("-x@example.org:y", "option"),
        ("https://example.org/a b", "blanks"),
        ("https://example.org/\x1b[2J", "control"),
        ("https://example.org/a\nb", "control"),
        ("/no/such/place", "no such path"),
    ],
)
def test_hostile_names_of_repositories(url: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=why):
        check_repository(url)
    with pytest.raises(BuildFailed):
        source_of(url, "master", tmp_path, tmp_path, os.environ)


@pytest.mark.parametrize("name", ["master", "b11434", "feature/x-1", "v1.0_rc", "0123abc"])
def test_names_of_branches(name: str) -> None:
    check_reference(name)


NO_BRANCHES = [
    "-f",
    "--upload-pack=x",
    "a..b",
    "a~1",
    "a^",
    "a:b",
    "a?",
    "a*",
    "a[",
    "a\\b",
    "a@{1}",
    "@",
    "/a",
    "a/",
    ".a",
    "a/.b",
    "a.",
    "a.lock",
]


@pytest.mark.parametrize("name", ["", "a b", "a\x00", "a\n", "x" * 251, *NO_BRANCHES])
def test_hostile_names_of_branches(name: str) -> None:
    with pytest.raises(BuildFailed, match="no branch, tag or commit"):
        check_reference(name)


def test_passwords_are_hidden() -> None:
    assert hide_credentials("fetch https://me:secret@example.org/x") == "fetch https://***@example.org/x"
    assert hide_credentials("https://example.org/@x") == "https://example.org/@x"


async def test_a_password_does_not_show_in_an_error(tmp_path: Path) -> None:
    source = GitSource.at("http://me:hush@127.0.0.1:1/x", "main", tmp_path / "clone", os.environ)
    with pytest.raises(BuildFailed) as caught:
        await source.newest()
    assert "can't be reached" in str(caught.value)
    assert "folder or an archive" in str(caught.value)
    assert "hush" not in caught.value.report()
    assert caught.value.exit_code == 128


async def test_a_password_travels_in_a_header_and_not_in_the_url(tmp_path: Path) -> None:
    seen: list[tuple[str, str | None]] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["authorization"]))
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://me:hu%20sh@127.0.0.1:{server.server_address[1]}/x.git"
        source = source_of(url, "main", tmp_path / "clone", tmp_path, os.environ)
        with pytest.raises(BuildFailed) as caught:
            await source.newest()
        server.shutdown()
        thread.join()
    assert seen[0] == ("/x.git/info/refs?service=git-upload-pack", "Basic bWU6aHUgc2g=")
    assert "@" not in caught.value.command
    assert "hu" not in repr(source).split("environ")[0]
    assert "bWU6" not in repr(source)


async def test_git_itself_refuses_what_runs_programs(tmp_path: Path) -> None:
    """Also where nobody has looked at the name before."""
    mark = tmp_path / "mark"
    source = GitSource(f"ext::touch {mark}", "main", tmp_path / "clone", os.environ)
    with pytest.raises(BuildFailed):
        await source.newest()
    assert not mark.exists()


async def test_a_missing_git_is_named_with_its_package(tmp_path: Path) -> None:
    source = GitSource("https://example.org/x", "main", tmp_path / "clone", {"PATH": str(tmp_path)})
    with pytest.raises(BuildFailed, match="git is missing on this machine: apt install git"):
        await source.newest()


def test_what_a_path_is(tmp_path: Path) -> None:
    project = FakeProject(tmp_path / "repository")
    bare = tmp_path / "bare"
    project.commit(version="1")
    project.git("clone", "--quiet", "--bare", str(project.path), str(bare))
    (tmp_path / "folder").mkdir()
    (tmp_path / "archive.tar.gz").touch()
    kinds = {
        name: type(source_of(str(tmp_path / name), "main", tmp_path / "clone", tmp_path, os.environ))
        for name in ("repository", "bare", "folder", "archive.tar.gz")
    }
    assert kinds == {
        "repository": GitSource,
        "bare": GitSource,
        "folder": FolderSource,
        "archive.tar.gz": ArchiveSource,
    }


async def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"holds no CMakeLists\.txt"):
        await FolderSource(tmp_path).newest()


async def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_text("hello")
    with pytest.raises(BuildFailed, match="no archive that can be unpacked"):
        await ArchiveSource(path, tmp_path).newest()


async def test_an_archive_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README", "hello")
    source = ArchiveSource(path, tmp_path / "work")
    (tmp_path / "work").mkdir()
    commit = await source.newest()
    with pytest.raises(BuildFailed, match=r"holds no CMakeLists\.txt"):
        await source.check_out(commit, print)


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, **more: object) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for attribute, value in more.items():
        setattr(found, attribute, value)
    return found


@pytest.mark.parametrize(
    "hostile",
    [
        member("../outside", size=1),
        member("a/../../outside", size=1),
        member("link", type=tarfile.SYMTYPE, linkname="/etc"),
        member("link", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
        member("device", type=tarfile.CHRTYPE),
    ],
    ids=lambda m: m.name,
)
def test_a_hostile_tar(tmp_path: Path, hostile: tarfile.TarInfo) -> None:
    path = tar_of(tmp_path / "x.tar.gz", member("ok", size=1), hostile)
    with pytest.raises(ValueError):  # noqa: PT011 - tarfile's own words
        unpack(path, tmp_path / "in" / "here")
    assert not (tmp_path / "in" / "outside").exists()
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside-of-llamesh", "a\\..\\b"])
def test_a_hostile_zip(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ValueError, match="leads out"):
        unpack(path, tmp_path / "in" / "here")
    assert not Path("/tmp/outside-of-llamesh").exists()


def test_a_link_in_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(ValueError, match="is a link"):
        unpack(path, tmp_path / "here")


def test_an_archive_that_ends_too_early(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar.gz", member("big", size=100_000))
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises((ValueError, OSError)):
        unpack(path, tmp_path / "here")


def test_programs_stay_programs(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("folder/run")
    info.external_attr = 0o100755 << 16
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "#!/bin/sh\n")
    unpack(path, tmp_path / "here")
    assert os.access(tmp_path / "here" / "folder" / "run", os.X_OK)
