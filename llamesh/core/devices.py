"""Which devices a child can use: what its environment shows it, and what its arguments pick of that.

The rules for environment variables are those of CUDA's and ROCm's programming guides, the rules for flags
those of llama.cpp (`common/arg.cpp`, `src/llama.cpp`). llama-server reads LLAMA_ARG_* first; an argument on
the command line wins, and the last one where it is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamesh.core.readings import Device

_DEVICE = (frozenset({"-dev", "--device"}), "LLAMA_ARG_DEVICE")
_LAYERS = (frozenset({"-ngl", "--gpu-layers", "--n-gpu-layers"}), "LLAMA_ARG_N_GPU_LAYERS")
_SPLIT = (frozenset({"-sm", "--split-mode"}), "LLAMA_ARG_SPLIT_MODE")
_MAIN = (frozenset({"-mg", "--main-gpu"}), "LLAMA_ARG_MAIN_GPU")
_SHARES = (frozenset({"-ts", "--tensor-split"}), "LLAMA_ARG_TENSOR_SPLIT")

# ggml's names of its devices are a backend's name and a number. Older builds say Metal for MTL0.
_BACKEND_NAME = re.compile(r"(CUDA|ROCM|MUSA|VULKAN|MTL|METAL)(\d*)", re.IGNORECASE)
_ORDER = "CUDA_DEVICE_ORDER"
_SHOWN_TO_CUDA = "CUDA_VISIBLE_DEVICES"
# ROCm's runtime filters first, HIP then counts what is left; HIP takes CUDA's variable for its own.
_SHOWN_TO_ROCM = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Visible:
    """The devices that a child can use, in the order in which it counts them.

    `doubt` says why another set is possible, None where there is none.
    """

    devices: tuple[Device, ...]
    doubt: str | None = None


def visible_devices(
    devices: Sequence[Device], environ: Mapping[str, str], arguments: Sequence[str]
) -> Visible:
    """The devices on which a child with this environment and these arguments puts its model.

    Empty means that the model stays in system memory, or that the child won't start at all (an index beyond
    the last device): either way it takes none of these devices. Draft models and projectors, which have flags
    of their own, are not looked at.
    """
    there = [device for device in devices if device.holds_models]
    shown, doubt = _shown_to_cuda(devices, environ)
    rocm = [device for device in there if device.kind == "amd"]
    shown += _shown_to_rocm(rocm, environ)
    shown += [device for device in there if device.kind == "unified"]
    chosen, why = _chosen(shown, there, environ, arguments)
    return Visible(tuple(chosen), (doubt or why) if chosen else None)


def _shown_to_cuda(devices: Sequence[Device], environ: Mapping[str, str]) -> tuple[list[Device], str | None]:
    whole = [device for device in devices if device.kind in ("nvidia", "mig-parent")]
    parts = [device for device in devices if device.kind == "mig"]
    value = environ.get(_SHOWN_TO_CUDA)
    if value is None:
        # CUDA counts at most one MIG device in a process; beside whole GPUs it depends on the driver.
        uncut = [device for device in whole if device.kind == "nvidia"]
        mixed = f"without {_SHOWN_TO_CUDA}, whole GPUs are assumed to come before MIG devices"
        return uncut or parts[:1], mixed if uncut and parts else None
    shown: list[Device] = []
    doubt: str | None = None
    by_number = False
    for item in value.split(","):
        found, counted = _named(item.strip(), whole, parts)
        # The first invalid item ends the list; so does a device that is named again.
        if found is None:
            break
        if found in shown:
            doubt = f"{_SHOWN_TO_CUDA} names {found.uuid} twice"
            break
        by_number |= counted
        shown.append(found)
        if found.kind == "mig":
            break
    # A MIG device stands alone: the whole GPUs before it were named in vain.
    if shown and shown[-1].kind == "mig":
        shown = shown[-1:]
    # CUDA counts the fastest first unless told otherwise, the driver by PCI address: the same for equal GPUs.
    differ = len({device.name for device in whole}) > 1
    if by_number and differ and len(shown) < len(whole) and environ.get(_ORDER) != "PCI_BUS_ID":
        doubt = f"{_SHOWN_TO_CUDA} counts unequal GPUs, and {_ORDER} isn't PCI_BUS_ID"
    return shown, doubt


def _named(item: str, whole: Sequence[Device], parts: Sequence[Device]) -> tuple[Device | None, bool]:
    """The device that an item of CUDA_VISIBLE_DEVICES means, and whether it was counted by number."""
    if item.isascii() and item.isdecimal():
        number = int(item) if len(item) < 6 else len(whole)
        found = whole[number] if number < len(whole) else None
        if found is not None and found.kind == "mig-parent":
            # A GPU that was cut: its first part.
            found = next((part for part in parts if part.parent == found.uuid), None)
        return found, True
    if not item.startswith(("GPU-", "MIG-")):
        return None, False
    # The beginning of a UUID will do where only one device has it.
    matching = [d for d in (*whole, *parts) if d.uuid.lower().startswith(item.lower())]
    if len(matching) != 1:
        return None, False
    found = matching[0]
    if found.kind == "mig-parent":
        found = next((part for part in parts if part.parent == found.uuid), None)
    return found, False


def _shown_to_rocm(devices: list[Device], environ: Mapping[str, str]) -> list[Device]:
    shown = devices
    for position, variable in enumerate(_SHOWN_TO_ROCM):
        value = environ.get(variable)
        if value is None or (position == 2 and _SHOWN_TO_ROCM[1] in environ):
            continue
        kept: list[Device] = []
        for item in (part.strip() for part in value.split(",")):
            if item.isascii() and item.isdecimal() and int(item[:6]) < len(shown):
                found = shown[int(item[:6])]
            else:
                same = [device for device in shown if item.startswith("GPU-") and device.uuid == item]
                if not same:
                    break
                found = same[0]
            if found not in kept:
                kept.append(found)
        shown = kept
    return shown


def _chosen(
    shown: list[Device], there: Sequence[Device], environ: Mapping[str, str], arguments: Sequence[str]
) -> tuple[list[Device], str | None]:
    """What the flags leave of the devices that are shown to the child."""

    def asked(flag: tuple[frozenset[str], str]) -> str | None:
        value = _last(arguments, flag[0])
        return environ.get(flag[1]) if value is None else value

    layers = asked(_LAYERS)
    if layers is not None and layers.strip() == "0":
        return [], None
    doubt: str | None = None
    names = asked(_DEVICE)
    chosen = shown
    if names is not None:
        chosen, doubt = _by_backend_name(names, shown, there)
    if asked(_SPLIT) == "none":
        number = _number(asked(_MAIN) or "0")
        return ([chosen[number]] if number is not None and 0 <= number < len(chosen) else []), doubt
    shares = [_share(part) for part in re.split(r"[,/]+", asked(_SHARES) or "")]
    if any(shares):
        # Devices beyond the end of the list get no share.
        chosen = [device for device, share in zip(chosen, shares, strict=False) if share]
    return chosen, doubt


def _by_backend_name(
    names: str, shown: list[Device], there: Sequence[Device]
) -> tuple[list[Device], str | None]:
    chosen: list[Device] = []
    doubt: str | None = None
    for name in (part.strip() for part in names.split(",")):
        match = _BACKEND_NAME.fullmatch(name)
        if match is None:
            continue  # none, or a device that isn't ours to measure: RPC, BLAS
        backend, number = match[1].upper(), int(match[2][:6] or 0)
        if backend == "VULKAN":
            # Vulkan neither asks CUDA's variables nor counts in the driver's order.
            candidates, doubt = list(there), f"Vulkan may count devices otherwise than by {name}"
        elif backend in ("MTL", "METAL"):
            candidates = [device for device in shown if device.kind == "unified"]
        elif backend == "ROCM":
            candidates = [device for device in shown if device.kind == "amd"]
        else:
            candidates = [device for device in shown if device.kind in ("nvidia", "mig")]
        if number < len(candidates) and candidates[number] not in chosen:
            chosen.append(candidates[number])
    return chosen, doubt if len(there) > 1 else None


def _last(arguments: Sequence[str], spellings: frozenset[str]) -> str | None:
    """The value of the last of `spellings`, None where the flag isn't there or lacks one."""
    found: str | None = None
    for index, argument in enumerate(arguments[:-1]):
        # llama-server takes --main_gpu for --main-gpu.
        name = argument.replace("_", "-") if argument.startswith("--") else argument
        if name in spellings:
            found = arguments[index + 1]
    return found


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*-?[0-9]{1,6}\s*", text) else None


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
