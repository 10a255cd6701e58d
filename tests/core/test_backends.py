"""Which backend is built for which machine, and what is said about it."""

from __future__ import annotations

import pytest

from llamesh.core.backends import (
    Machine,
    arguments_for,
    choose_backend,
    gpus_unused,
    missing_for,
    names_backend,
)


def machine(gpus: str = "", tools: str = "", system: str = "Linux") -> Machine:
    named = {"vk": ("glslc", "vulkan headers")}
    words = [one for word in tools.split() for one in named.get(word, (word,))]
    return Machine(system, frozenset(gpus.split()), frozenset(words))


@pytest.mark.parametrize(
    ("there", "backend", "notes"),
    [
        (machine(), "cpu", []),
        (machine(tools="nvcc hipcc vk"), "cpu", []),
        (machine("nvidia", "nvcc vk"), "cuda", []),
        (machine("nvidia", "vk"), "vulkan", ["nvcc is missing; it comes with the CUDA toolkit"]),
        (machine("nvidia"), "cpu", ["nvidia-cuda-toolkit", "apt install glslc"]),
        (machine("amd", "hipcc"), "hip", []),
        (machine("amd", "glslc"), "cpu", ["hipcc", "libvulkan-dev"]),
        (machine("intel", "vk"), "vulkan", []),
        (machine("intel nvidia", "nvcc vk"), "cuda", []),
        (machine("apple", system="Darwin"), "metal", []),
    ],
)
def test_the_best_that_can_be_built(there: Machine, backend: str, notes: list[str]) -> None:
    choice = choose_backend(there)
    assert choice.backend == backend
    assert len(choice.notes) == len(notes)
    for said, expected in zip(choice.notes, notes, strict=True):
        assert expected in said


def test_what_is_missing_is_named_with_its_package() -> None:
    assert missing_for("cpu", machine()) == ()
    assert "apt install nvidia-cuda-toolkit" in missing_for("cuda", machine())[0]
    assert len(missing_for("vulkan", machine())) == 2
    assert missing_for("metal", machine()) == ("Metal is for macOS only",)
    assert missing_for("metal", machine(system="Darwin")) == ()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], False),
        (["-DGGML_NATIVE=OFF"], False),
        (["-DGGML_CUDA=ON"], True),
        (["-DGGML_CUDA:BOOL=OFF"], True),
        (["-D", "GGML_VULKAN=ON"], True),
        ([*arguments_for("cpu")], True),
        ([*arguments_for("hip")], True),
    ],
)
def test_arguments_that_choose(arguments: list[str], named: bool) -> None:
    assert names_backend(arguments) is named


@pytest.mark.parametrize(
    ("gpus", "devices", "unused"),
    [
        ("", [], ()),
        ("nvidia", [], ("nvidia",)),
        ("nvidia", ["CUDA0"], ()),
        ("nvidia", ["Vulkan0"], ()),
        ("amd", ["CUDA0"], ("amd",)),
        ("amd", ["ROCm0"], ()),
        ("nvidia amd", ["CUDA0", "CUDA1"], ("amd",)),
        ("apple", ["Metal"], ()),
        ("apple", ["MTL0"], ()),
        # Too slow to be missed.
        ("intel", [], ()),
    ],
)
def test_gpus_that_an_engine_leaves_alone(gpus: str, devices: list[str], unused: tuple[str, ...]) -> None:
    assert gpus_unused(frozenset(gpus.split()), devices) == unused
