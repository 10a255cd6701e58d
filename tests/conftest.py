"""Fixtures that every part of the tests shares: the tiny model and the engines to run it on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.tiny_model import write_tiny_model

# Properties aren't timed: a busy machine is no mistake of theirs.
settings.register_profile("llamesh", deadline=None)
settings.load_profile("llamesh")

LLAMA_SERVER_VARIABLE = "LLAMESH_TEST_LLAMA_SERVER"


def real_llama_server() -> Path | None:
    """The llama-server that the environment names, None where it names none.

    A name that leads nowhere ends the run: tests that were asked for must not vanish silently.
    """
    named = os.environ.get(LLAMA_SERVER_VARIABLE)
    if not named:
        return None
    path = Path(named)
    if not os.access(path, os.X_OK):
        raise pytest.UsageError(f"{LLAMA_SERVER_VARIABLE}={named}: no such executable file")
    return path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes `engine_binary` on the embedded engine, and on llama-server if it is named."""
    if "engine_binary" in metafunc.fixturenames:
        binaries: dict[str, Path | None] = {"embedded": None}
        if (named := real_llama_server()) is not None:
            binaries["llama-server"] = named
        metafunc.parametrize("engine_binary", list(binaries.values()), ids=list(binaries))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's file, written once a session. Don't change it: copy it, or write another."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def llama_server() -> Path:
    """The real llama-server, for tests that make no sense on the embedded engine."""
    named = real_llama_server()
    if named is None:
        pytest.skip(f"{LLAMA_SERVER_VARIABLE} doesn't name a llama-server")
    return named
