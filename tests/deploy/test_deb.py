"""The Debian package: what is in it, and its life in a clean system that isn't running."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import llamesh
from tests.support.clean_root import CleanRoot

CONFFILES = ["/etc/llamesh/config.yaml", "/etc/llamesh/cookbook.yaml", "/etc/llamesh/secrets.yaml"]


def install(root: CleanRoot, package: Path) -> None:
    root.copy(package, "/root/llamesh.deb")
    root.run("dpkg", "--force-unsafe-io", "-i", "/root/llamesh.deb")


def control(package: Path) -> dict[str, str]:
    text = subprocess.run(
        ["dpkg-deb", "--field", str(package)], check=True, capture_output=True, text=True
    ).stdout
    lines = [line for line in text.splitlines() if not line.startswith(" ")]
    return dict(line.split(": ", 1) for line in lines)


def contents(package: Path) -> dict[str, tuple[str, str]]:
    """Path -> mode and owner."""
    listing = subprocess.run(
        ["dpkg-deb", "--contents", str(package)], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split(None, 5) for line in listing.splitlines()]
    return {row[5].split(" -> ")[0].removeprefix("."): (row[0], row[1]) for row in rows}


def test_what_it_says_and_holds(bare_package: Path) -> None:
    says = control(bare_package)
    assert (says["Package"], says["Version"]) == ("llamesh", llamesh.__version__)
    assert bare_package.name == f"llamesh_{says['Version']}_{says['Architecture']}.deb"
    assert says["Depends"].startswith("python3.")
    holds = contents(bare_package)
    assert {owner for _, owner in holds.values()} == {"root/root"}
    for unit in ("llamesh.service", "llamesh.socket", "llamesh-peers.socket"):
        assert holds[f"/usr/lib/systemd/system/{unit}"][0] == "-rw-r--r--"
    # secrets.yaml isn't the world's to read, not even between unpacking and configuring.
    assert {holds[path][0] for path in CONFFILES} == {"-rw-r-----"}
    assert [path for path, (mode, _) in holds.items() if mode[8] == "w" and mode[0] != "l"] == []
    assert [path for path, (mode, _) in holds.items() if "s" in mode] == []
    assert "/usr/bin/llamesh" in holds


def test_nothing_in_it_names_the_folder_it_was_built_in(bare_package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--raw-extract", str(bare_package), str(tmp_path / "x")], check=True)
    here = str(Path(__file__).parents[2]).encode()
    for path in (tmp_path / "x").rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            assert here not in data, path
            assert b"/tmp/tmp." not in data, path


def test_its_life(clean_root: CleanRoot, bare_package: Path) -> None:
    root = clean_root
    install(root, bare_package)
    # Without what it depends on it can't do more than say what is missing; with it see test_machine.
    assert "No module named 'click'" in root.run("/usr/bin/llamesh", "--help", fails=True)
    passwd = root.run("getent", "passwd", "llamesh").strip().split(":")
    assert (passwd[5], passwd[6]) == ("/var/lib/llamesh", "/usr/sbin/nologin")
    assert "video" in root.run("id", "-nG", "llamesh").split()
    assert root.owner("/var/lib/llamesh") == ("llamesh", "llamesh", 0o750)
    assert root.owner("/etc/llamesh") == ("root", "llamesh", 0o2770)
    assert {root.owner(path) for path in CONFFILES} == {("root", "llamesh", 0o640)}
    for unit in ("llamesh.service", "llamesh.socket"):
        assert root.run("systemctl", "is-enabled", unit).strip() == "enabled"
    assert root.run("systemctl", "is-enabled", "llamesh-peers.socket", fails=True).strip() == "disabled"

    # Again: what was edited and what an administrator decided stays.
    root.write("/etc/llamesh/cookbook.yaml", "models: []  # mine\n")
    root.run("systemctl", "disable", "llamesh.socket")
    install(root, bare_package)
    assert "# mine" in root.run("cat", "/etc/llamesh/cookbook.yaml")
    assert root.run("systemctl", "is-enabled", "llamesh.socket", fails=True).strip() == "disabled"
    assert {root.owner(path) for path in CONFFILES} == {("root", "llamesh", 0o640)}
    assert root.run("dpkg", "--verify", "llamesh").split() == ["??5??????", "c", "/etc/llamesh/cookbook.yaml"]

    # Removed: the program goes, what is one's own stays.
    root.write("/var/lib/llamesh/.llama-mesh/node.key", "secret\n")
    root.run("dpkg", "-r", "llamesh")
    assert not (root.files / "opt/llamesh").exists()
    assert not (root.files / "usr/bin/llamesh").is_symlink()
    assert "# mine" in root.run("cat", "/etc/llamesh/cookbook.yaml")
    assert (root.files / "var/lib/llamesh/.llama-mesh/node.key").exists()

    # Purged: nothing but models, which took somebody hours to download, and the user, whose files they are.
    root.write("/var/lib/llamesh/models/large.gguf", "GGUF")
    root.run("dpkg", "-P", "llamesh")
    assert not (root.files / "etc/llamesh").exists()
    left = sorted(p.name for p in (root.files / "var/lib/llamesh").rglob("*"))
    assert left == ["large.gguf", "models"]
    assert root.run("getent", "passwd", "llamesh")
    links = [p for p in (root.files / "etc/systemd/system").rglob("*llamesh*") if p.is_symlink()]
    assert links == []


def test_a_purge_leaves_no_empty_folder(clean_root: CleanRoot, bare_package: Path) -> None:
    install(clean_root, bare_package)
    (clean_root.files / "var/lib/llamesh/models").mkdir()
    clean_root.run("dpkg", "-P", "llamesh")
    assert not (clean_root.files / "var/lib/llamesh").exists()


@pytest.mark.parametrize("option", ["--frobnicate", "-o"])
def test_a_wrong_option_is_told(option: str) -> None:
    script = Path(__file__).parents[2] / "scripts/build_deb"
    done = subprocess.run([str(script), option], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert option in done.stderr
