"""Which backend of llama.cpp to build for a machine, and what is missing to do so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Backend: TypeAlias = Literal["cpu", "cuda", "metal", "vulkan", "hip"]

BACKENDS: tuple[Backend, ...] = ("cpu", "cuda", "metal", "vulkan", "hip")

# cmake's switch for each backend (ggml/CMakeLists.txt of b11434).
_SWITCH: dict[Backend, str] = {
    "cuda": "GGML_CUDA",
    "metal": "GGML_METAL",
    "vulkan": "GGML_VULKAN",
    "hip": "GGML_HIP",
}

# Whoever sets one of these has chosen.
_CHOICES = (*_SWITCH.values(), "GGML_SYCL", "GGML_MUSA", "GGML_CANN", "GGML_OPENCL", "GGML_WEBGPU")

# Makers of GPUs, and the backends for each, the fastest first.
_FOR_GPU: dict[str, tuple[Backend, ...]] = {
    "nvidia": ("cuda", "vulkan"),
    "amd": ("hip", "vulkan"),
    "intel": ("vulkan",),
}

# What a backend is built with, beside cmake and a compiler: tool -> who brings it.
_TOOLS: dict[Backend, dict[str, str]] = {
    "cpu": {},
    "metal": {},
    "cuda": {"nvcc": "the CUDA toolkit (Debian, Ubuntu: apt install nvidia-cuda-toolkit)"},
    "hip": {"hipcc": "ROCm (Debian, Ubuntu: apt install hipcc libhipblas-dev librocblas-dev)"},
    "vulkan": {
        "glslc": "the shader compiler (Debian, Ubuntu: apt install glslc; Homebrew: brew install shaderc)",
        "vulkan headers": "Vulkan's headers (Debian, Ubuntu: apt install libvulkan-dev; "
        "Homebrew: brew install vulkan-headers vulkan-loader)",
    },
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is: `system` ("Linux", "Darwin"), makers of the GPUs, and tools by name."""

    system: str
    gpus: frozenset[str] = frozenset()
    tools: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend to build, and what to say about it: the better ones that couldn't be chosen."""

    backend: Backend
    notes: tuple[str, ...] = ()


def choose_backend(machine: Machine) -> Choice:
    """The best backend that can be built here. A GPU that stays unused is worth a note."""
    if machine.system == "Darwin":
        return Choice("metal")
    notes: list[str] = []
    for maker, backends in _FOR_GPU.items():
        if maker not in machine.gpus:
            continue
        for backend in backends:
            missing = missing_for(backend, machine)
            if not missing:
                return Choice(backend, tuple(notes))
            notes.append(f"this machine has a GPU of {maker}, but {backend} can't be built: {missing[0]}")
    return Choice("cpu", tuple(notes))


def missing_for(backend: Backend, machine: Machine) -> tuple[str, ...]:
    """Each tool that the backend needs and the machine hasn't, with the package that brings it."""
    if backend == "metal" and machine.system != "Darwin":
        return ("Metal is for macOS only",)
    return tuple(
        f"{tool} is missing; it comes with {package}"
        for tool, package in _TOOLS[backend].items()
        if tool not in machine.tools
    )


def arguments_for(backend: Backend) -> tuple[str, ...]:
    """What cmake is told for a backend."""
    if backend == "cpu":
        # Metal is on by default where there is a Mac; the others aren't.
        return ("-DGGML_METAL=OFF",)
    return (f"-D{_SWITCH[backend]}=ON",)


def names_backend(arguments: Sequence[str]) -> bool:
    """Whether arguments for cmake say which backend to build."""
    return any(f"-D{name}" in word or word.startswith(name) for word in arguments for name in _CHOICES)


def gpus_unused(gpus: frozenset[str], devices: Sequence[str]) -> tuple[str, ...]:
    """Makers whose GPUs an engine can't use that lists these `devices` (names such as "CUDA0")."""
    kinds = {"".join(c for c in name if c.isalpha()).lower() for name in devices}
    by_maker = {"nvidia": {"cuda", "vulkan"}, "amd": {"rocm", "hip", "vulkan"}, "apple": {"metal", "mtl"}}
    return tuple(maker for maker, able in by_maker.items() if maker in gpus and not kinds & able)
