"""Which devices a child sees, by environment and flags."""

from __future__ import annotations

import pytest

from llamesh.core.devices import visible_devices
from llamesh.core.readings import Device

A = Device(0, "GPU-aaaa1111", "Fake", "nvidia")
B = Device(1, "GPU-aaaa2222", "Fake", "nvidia")
C = Device(2, "GPU-cccc3333", "Fake", "nvidia")
ALL = (A, B, C)
SLOW = Device(3, "GPU-dddd4444", "Slower Fake", "nvidia")
CUT = Device(1, "GPU-eeee5555", "Fake", "mig-parent")
PART = Device(1, "MIG-11110000", "Part", "mig", parent=CUT.uuid)
OTHER_PART = Device(1, "MIG-22220000", "Part", "mig", parent=CUT.uuid)
RED = Device(0, "GPU-0123456789abcdef", "Red", "amd")
REDDER = Device(1, "GPU-fedcba9876543210", "Red", "amd")
APPLE = Device(0, "unified", "Apple", "unified")

CUDA = "CUDA_VISIBLE_DEVICES"


def seen(devices: tuple[Device, ...], environ: dict[str, str], *arguments: str) -> tuple[Device, ...]:
    return visible_devices(devices, environ, arguments).devices


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0,1,2", (A, B, C)),
        ("2,0", (C, A)),
        (" 1 , 2 ", (B, C)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("1,-1,2", (B,)),
        ("0,7,1", (A,)),
        ("0,x,1", (A,)),
        ("99999999999999999999", ()),
        ("٣", ()),
        ("GPU-cccc3333", (C,)),
        ("GPU-cc", (C,)),
        ("GPU-CC", (C,)),
        ("GPU-aaaa", ()),  # two begin so
        ("GPU-zzzz", ()),
        ("GPU-cccc3333,GPU-aaaa1111", (C, A)),
        ("1,GPU-cccc", (B, C)),
    ],
)
def test_cuda_visible_devices(value: str, expected: tuple[Device, ...]) -> None:
    visible = visible_devices(ALL, {CUDA: value}, ())
    assert visible.devices == expected
    assert visible.doubt is None


def test_nothing_said_shows_all() -> None:
    assert seen(ALL, {}) == ALL
    assert seen((A, RED, APPLE), {}) == (A, RED, APPLE)
    assert seen((), {}) == ()


def test_a_device_named_twice_is_doubtful() -> None:
    visible = visible_devices(ALL, {CUDA: "0,0,1"}, ())
    assert visible.devices == (A,)
    assert "twice" in (visible.doubt or "")


def test_numbers_of_unequal_devices_are_doubtful() -> None:
    unequal = (A, SLOW)
    assert visible_devices(unequal, {CUDA: "1"}, ()).doubt
    assert visible_devices(unequal, {CUDA: "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ()).doubt is None
    assert visible_devices(unequal, {CUDA: "GPU-d"}, ()).doubt is None
    assert visible_devices(unequal, {CUDA: "1,0"}, ()).doubt is None
    assert visible_devices(unequal, {CUDA: "1"}, ("-ngl", "0")).doubt is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("MIG-2222", (OTHER_PART,)),
        ("MIG-1111,MIG-2222", (PART,)),  # never more than one
        ("1", (PART,)),
        ("GPU-eeee", (PART,)),
        ("0", (A,)),
        ("0,MIG-1111", (PART,)),
        ("MIG-3333", ()),
    ],
)
def test_mig_devices(value: str, expected: tuple[Device, ...]) -> None:
    assert seen((A, CUT, PART, OTHER_PART), {CUDA: value}) == expected


def test_mig_devices_without_a_word() -> None:
    assert seen((CUT, PART, OTHER_PART), {}) == (PART,)
    assert seen((CUT,), {}) == ()
    assert seen((CUT,), {CUDA: "0"}) == ()
    mixed = visible_devices((A, CUT, PART), {}, ())
    assert mixed.devices == (A,)
    assert mixed.doubt


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"ROCR_VISIBLE_DEVICES": "1"}, (REDDER,)),
        ({"ROCR_VISIBLE_DEVICES": "GPU-fedcba9876543210"}, (REDDER,)),
        ({"ROCR_VISIBLE_DEVICES": ""}, ()),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, (REDDER, RED)),
        ({"HIP_VISIBLE_DEVICES": "0,-1"}, (RED,)),
        ({CUDA: "1"}, (REDDER,)),
        ({CUDA: "0", "HIP_VISIBLE_DEVICES": "1"}, (REDDER,)),
        # The runtime filters first, then HIP counts what is left.
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, (REDDER,)),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, ()),
    ],
)
def test_rocm(environ: dict[str, str], expected: tuple[Device, ...]) -> None:
    assert seen((RED, REDDER), environ) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-dev none", ()),
        ("--device none", ()),
        ("-dev CUDA1", (B,)),
        ("--device CUDA2,CUDA0", (C, A)),
        ("--device cuda2", (C,)),
        ("-dev CUDA0 -dev CUDA1", (B,)),
        ("-dev CUDA9", ()),
        ("-dev ROCm0", ()),
        ("-dev RPC0,CUDA1", (B,)),
        ("-ngl 0", ()),
        ("--gpu-layers 0 --n-gpu-layers 99", (A, B, C)),
        ("--n_gpu_layers 0", ()),
        ("-ngl auto", (A, B, C)),
        ("-ngl -1", (A, B, C)),
        ("-ngl", (A, B, C)),
        ("-sm none", (A,)),
        ("-sm none -mg 2", (C,)),
        ("-sm none --main_gpu 1", (B,)),
        ("-sm none -mg 7", ()),
        ("-sm none -mg -1", ()),
        ("-sm none -mg x", ()),
        ("-dev CUDA2,CUDA1 -sm none -mg 1", (B,)),
        ("-sm row -mg 1", (A, B, C)),
        ("-mg 1", (A, B, C)),
        ("-ts 3,1", (A, B)),
        ("-ts 1,0,1", (A, C)),
        ("-ts 0/1", (B,)),
        ("-ts 0,0", (A, B, C)),
        ("-ts x", (A, B, C)),
        ("-dev CUDA2,CUDA0 -ts 1", (C,)),
    ],
)
def test_flags(arguments: str, expected: tuple[Device, ...]) -> None:
    assert seen(ALL, {}, *arguments.split()) == expected


def test_flags_count_what_the_environment_shows() -> None:
    assert seen(ALL, {CUDA: "2,1"}, "-dev", "CUDA0") == (C,)
    assert seen(ALL, {CUDA: "2,1"}, "-sm", "none", "-mg", "1") == (B,)


def test_flags_from_the_environment_give_way_to_arguments() -> None:
    assert seen(ALL, {"LLAMA_ARG_DEVICE": "CUDA1"}) == (B,)
    assert seen(ALL, {"LLAMA_ARG_DEVICE": "CUDA1"}, "-dev", "CUDA2") == (C,)
    assert seen(ALL, {"LLAMA_ARG_N_GPU_LAYERS": "0"}) == ()
    assert seen(ALL, {"LLAMA_ARG_SPLIT_MODE": "none", "LLAMA_ARG_MAIN_GPU": "2"}) == (C,)


def test_names_of_other_backends() -> None:
    assert seen((A, RED, REDDER), {}, "-dev", "ROCm1") == (REDDER,)
    assert seen((APPLE,), {}, "-dev", "MTL0") == (APPLE,)
    assert seen((APPLE,), {}, "-dev", "Metal") == (APPLE,)
    assert seen((CUT, PART), {}, "-dev", "CUDA0") == (PART,)
    alone = visible_devices((A,), {CUDA: ""}, ("-dev", "Vulkan0"))
    assert (alone.devices, alone.doubt) == ((A,), None)
    several = visible_devices(ALL, {}, ("-dev", "Vulkan1"))
    assert several.devices == (B,)
    assert several.doubt
