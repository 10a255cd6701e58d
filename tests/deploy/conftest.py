"""Packages to install, and systems to install them into."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clean_root import CleanRoot, why_not
from tests.support.node import CHECKOUT

BUILD_SECONDS = 900.0


def script(*words: str) -> str:
    """What a script of the checkout prints; the test is skipped with its reason when it can't do its work."""
    done = subprocess.run(
        [str(CHECKOUT / words[0]), *words[1:]], capture_output=True, text=True, timeout=BUILD_SECONDS
    )
    if done.returncode:
        pytest.skip(
            f"{words[0]}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}"
        )
    return done.stdout.strip()


@pytest.fixture(scope="session")
def lowest() -> Path:
    """A minimal Debian that nobody may change."""
    if reason := why_not("unshare", "nsenter", "apt-get"):
        pytest.skip(reason)
    return Path(script("scripts/make_clean_root"))


@pytest.fixture
def clean_root(lowest: Path, tmp_path: Path) -> Iterator[CleanRoot]:
    """A minimal Debian to install into."""
    with CleanRoot(lowest, tmp_path) as root:
        yield root


@pytest.fixture(scope="session")
def bare_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package without what it depends on: it installs, but can't serve."""
    if reason := why_not("dpkg-deb"):
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("bare")
    return Path(script("scripts/build_deb", "--fast", "--without-dependencies", "-o", str(out)))


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package as it is shipped, but for its compression."""
    if reason := why_not("dpkg-deb"):
        pytest.skip(reason)
    return Path(script("scripts/build_deb", "--fast", "-o", str(tmp_path_factory.mktemp("package"))))
