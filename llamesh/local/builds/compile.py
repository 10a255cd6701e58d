"""Configuring and compiling, with progress."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import trio

from llamesh.core.builds import TARGET, Recipe, jobs, progress_of, with_jobs
from llamesh.local.builds import machine
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.tools import need, run_tool

CONFIGURE = "configuring"
COMPILE = "compiling"

# One file of a GPU backend may take many minutes without a line.
_SILENT_SECONDS = 3600.0

# What everybody gets, before the backend's and the user's own arguments, which may say otherwise. Libraries
# are found beside the program that needs them, so that both can be moved.
_ALWAYS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)

_NINJA_STATUS = "[%f/%t] "


async def compile_source(
    source: Path,
    folder: Path,
    recipe: Recipe,
    environ: Mapping[str, str],
    *,
    on_stage: Callable[[str], None],
    on_progress: Callable[[float], None],
    on_line: Callable[[str], None],
) -> Path:
    """Compile `source` in `folder`, maybe over an earlier commit's objects; the folder of the products.

    What is there already is used again; if it gets in the way, the second try begins with nothing.
    Raises BuildFailed.
    """
    if not (source / "CMakeLists.txt").is_file():
        raise BuildFailed(CONFIGURE, f"{source} holds no CMakeLists.txt: it isn't the source of llama.cpp")
    used_before = (folder / "CMakeCache.txt").exists()
    try:
        return await _compile(source, folder, recipe, environ, on_stage, on_progress, on_line)
    except BuildFailed:
        if not used_before:
            raise
    on_line("what an earlier build left may be in the way: beginning anew")
    await trio.to_thread.run_sync(shutil.rmtree, folder)
    return await _compile(source, folder, recipe, environ, on_stage, on_progress, on_line)


async def _compile(
    source: Path,
    folder: Path,
    recipe: Recipe,
    environ: Mapping[str, str],
    on_stage: Callable[[str], None],
    on_progress: Callable[[float], None],
    on_line: Callable[[str], None],
) -> Path:
    on_stage(CONFIGURE)
    cmake = need("cmake", environ, CONFIGURE)
    if not environ.get("CXX"):
        need("c++", environ, CONFIGURE)
    generator = _generator(recipe, environ)
    folder.mkdir(parents=True, exist_ok=True)
    more = {"NINJA_STATUS": _NINJA_STATUS, "CLICOLOR_FORCE": "0", "PATH": machine.search_path(environ)}
    configure = [cmake, *generator, "-S", str(source), "-B", str(folder), *_ALWAYS, *recipe.arguments]
    await run_tool(
        configure, stage=CONFIGURE, environ=environ, more=more, on_line=on_line, silence=_SILENT_SECONDS
    )
    on_stage(COMPILE)

    def read(line: str) -> None:
        on_line(line)
        if (part := progress_of(line)) is not None:
            on_progress(part)

    free = psutil.virtual_memory().available >> 20
    command = with_jobs(recipe.command, jobs(len(_cores()), free))
    await run_tool(
        [cmake, "--build", str(folder), "--config", "Release", "--target", TARGET, *command],
        stage=COMPILE,
        environ=environ,
        more=more,
        on_line=read,
        silence=_SILENT_SECONDS,
    )
    for products in (folder / "bin", folder / "bin" / "Release"):
        if (products / TARGET).is_file():
            return products
    raise BuildFailed(COMPILE, f"it ended well, but there is no {folder / 'bin' / TARGET}")


def _generator(recipe: Recipe, environ: Mapping[str, str]) -> list[str]:
    """Ninja where there is one, unless the user chose; else whatever cmake takes by itself, which is make."""
    if environ.get("CMAKE_GENERATOR") or any(word.startswith("-G") for word in recipe.arguments):
        return []
    path = environ.get("PATH", os.defpath)
    if shutil.which("ninja", path=path) or shutil.which("ninja-build", path=path):
        return ["-G", "Ninja"]
    need("make", environ, CONFIGURE)
    return []


def _cores() -> set[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
