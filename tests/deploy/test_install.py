"""deploy/install.sh in a clean system that isn't running: installs, updates, refuses, removes."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import click
import pytest

from tests.support.clean_root import CleanRoot
from tests.support.node import CHECKOUT

WHEEL = "/root/llamesh-0-py3-none-any.whl"
# No index is there to ask, and but for click, llamesh's packages aren't needed to see that it is installed.
OFFLINE = ("--", "--no-index", "--no-deps")


@pytest.fixture
def root(clean_root: CleanRoot, tmp_path: Path) -> CleanRoot:
    """With the checkout's deploy folder in it, and a wheel of llamesh with nothing of what it depends on but
    what `--help` needs."""
    wheel = tmp_path / Path(WHEEL).name
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((CHECKOUT / "llamesh").rglob("*.py")):
            archive.write(path, str(path.relative_to(CHECKOUT)))
        library = Path(click.__file__).parent
        for path in sorted(library.rglob("*.py")):
            archive.write(path, str(path.relative_to(library.parent)))
        info = "llamesh-0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llamesh\nVersion: 0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    clean_root.copy(wheel, WHEEL)
    shutil.copytree(CHECKOUT / "deploy", clean_root.files / "root/checkout/deploy")
    return clean_root


def install(root: CleanRoot, *options: str, fails: bool = False) -> str:
    return root.run("/root/checkout/deploy/install.sh", *options, fails=fails)


def test_installed_updated_and_removed(root: CleanRoot) -> None:
    said = install(root, "--from", WHEEL, *OFFLINE)
    assert "done. Models: /etc/llamesh/cookbook.yaml" in said
    assert "Usage: llamesh" in root.run("/usr/local/bin/llamesh", "--help")
    assert root.owner("/var/lib/llamesh") == ("llamesh", "llamesh", 0o750)
    assert root.owner("/etc/llamesh") == ("root", "llamesh", 0o2770)
    assert root.owner("/etc/llamesh/secrets.yaml") == ("root", "llamesh", 0o640)
    assert root.owner("/etc/systemd/system/llamesh.service") == ("root", "root", 0o644)
    assert root.run("systemctl", "is-enabled", "llamesh.service").strip() == "enabled"
    assert root.run("systemctl", "is-enabled", "llamesh.socket").strip() == "enabled"
    assert root.run("getent", "passwd", "llamesh").strip().endswith(":/var/lib/llamesh:/usr/sbin/nologin")

    # Again: configuration and state are kept, nothing is there twice, nothing is left of the former one.
    root.write("/etc/llamesh/cookbook.yaml", "models: []  # mine\n")
    root.write("/opt/llamesh/of-the-former-one", "")
    install(root, "--from", WHEEL, *OFFLINE)
    assert "# mine" in root.run("cat", "/etc/llamesh/cookbook.yaml")
    assert root.owner("/etc/llamesh/cookbook.yaml") == ("root", "llamesh", 0o640)
    assert not (root.files / "opt/llamesh/of-the-former-one").exists()
    assert sorted(p.name for p in (root.files / "opt").iterdir()) == ["llamesh"]
    assert "Usage: llamesh" in root.run("/usr/local/bin/llamesh", "--help")

    # An update that fails leaves what is there.
    said = install(root, "--from", "/root/nothing.whl", *OFFLINE, fails=True)
    assert "pip could not install /root/nothing.whl" in said
    assert sorted(p.name for p in (root.files / "opt").iterdir()) == ["llamesh"]
    assert "Usage: llamesh" in root.run("/usr/local/bin/llamesh", "--help")

    install(root, "--uninstall")
    assert list((root.files / "opt").iterdir()) == []
    assert not (root.files / "usr/local/bin/llamesh").is_symlink()
    assert list((root.files / "etc/systemd/system").rglob("*llamesh*")) == []
    assert "# mine" in root.run("cat", "/etc/llamesh/cookbook.yaml")
    install(root, "--uninstall")


def test_elsewhere_and_without_a_start(root: CleanRoot) -> None:
    install(root, "--from", WHEEL, "--prefix", "/srv/llamesh", "--no-start", *OFFLINE)
    unit = root.run("cat", "/etc/systemd/system/llamesh.service")
    assert "ExecStart=/srv/llamesh/bin/python " in unit
    assert "/opt/llamesh" not in unit
    assert root.run("systemctl", "is-enabled", "llamesh.service", fails=True).strip() == "disabled"
    assert "Usage: llamesh" in root.run("/usr/local/bin/llamesh", "--help")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["--prefix"], "--prefix needs a value"),
        (["--prefix", "here"], "--prefix must begin with /"),
        (["--prefix", "/"], "would be all of the system"),
        (["--prefix", "/a#b"], "letters, digits"),
        (["--prefix", "/a b"], "no spaces"),
        (["--prefix", "/etc"], "/etc is there and wasn't made by this script"),
        (["--prefix", "/etc", "--uninstall"], "/etc is there and wasn't made by this script"),
        (["--from", "--index-url=http://127.0.0.1:1"], "--from needs a folder, a wheel or a name"),
        ([], "/root/checkout isn't a checkout of llamesh"),
    ],
)
def test_refused_before_anything_is_changed(root: CleanRoot, options: list[str], complaint: str) -> None:
    assert complaint in install(root, *options, fails=True)
    assert root.run("getent", "passwd", "llamesh", fails=True) == ""
    assert not (root.files / "opt/llamesh").exists()


def test_it_leaves_the_package_alone(root: CleanRoot, bare_package: Path) -> None:
    root.copy(bare_package, "/root/llamesh.deb")
    root.run("dpkg", "--force-unsafe-io", "-i", "/root/llamesh.deb")
    for options in (["--from", WHEEL], ["--uninstall"]):
        assert "the Debian package llamesh is installed" in install(root, *options, fails=True)
