"""Models for the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_model

ENDLESS_CONTEXT = 131_072


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that talks for many seconds when nobody limits it: for tests that interrupt it."""
    path = tmp_path_factory.mktemp("endless") / "endless.gguf"
    return write_tiny_model(path, context=ENDLESS_CONTEXT)
