"""A hub, and a cache of its own, for the tests of weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamesh.local.weights.cache import Cache, find_cache
from tests.support.hub import Hub, running_hub


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return find_cache({"HF_HOME": str(tmp_path / "hf")})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the real one. Nobody is logged in."""
    from huggingface_hub import close_session, constants

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        yield found
        close_session()
