"""Recorded file trees of the devices this software meets, built from their documented contents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dcqfa_ros.devices.detect import Device, Gpu, detect

GIB_IN_KB = 2**20

ORIN_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
VNNI_FLAGS = "fpu sse4_1 avx2 avx512f avx512_vnni avx_vnni amx_int8"
AVX2_FLAGS = "fpu sse4_1 avx2 fma"
SSE_FLAGS = "fpu sse4_1 sse4_2 ssse3"
ZEN_4_FLAGS = "fpu sse4_1 avx2 avx512f avx512_bf16 avx512_vnni"


def arm_cpuinfo(cores: int, features: str = ORIN_FEATURES, part: str = "0xd42") -> str:
    block = "processor\t: {}\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {}\n\n"
    return "".join(block.format(i, features, part) for i in range(cores))


def x86_cpuinfo(cores: int, flags: str, name: str) -> str:
    head = "processor\t: {}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 158\n"
    block = head + "model name\t: {}\nflags\t\t: {}\n\n"
    return "".join(block.format(i, name, flags) for i in range(cores))


def meminfo(total_gib: float, available_gib: float) -> str:
    total, available = int(total_gib * GIB_IN_KB), int(available_gib * GIB_IN_KB)
    return f"MemTotal:       {total} kB\nMemFree:          1024 kB\nMemAvailable:   {available} kB\n"


def jetson(model: str, module: str, carrier: str, memory: float, cores: int, release: str | None) -> dict[str, bytes]:
    family = "tegra234"
    files = {
        "proc/device-tree/model": model.encode() + b"\0",
        "proc/device-tree/compatible": f"nvidia,{carrier}+{module}\0nvidia,{module}\0nvidia,{family}\0".encode(),
        "proc/cpuinfo": arm_cpuinfo(cores).encode(),
        "proc/meminfo": meminfo(memory, memory / 2).encode(),
    }
    if release is not None:
        files["etc/nv_tegra_release"] = release.encode()
        files["var/lib/nvpmodel/status"] = b"pmode:0002 fmode:quiet\n"
    return files


R36_4_3 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
R35_4_1 = "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 2023\n"
NX = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"

TREES: dict[str, dict[str, bytes]] = {
    "orin_nx_16": jetson(NX, "p3767-0000", "p3768-0000", 15.3, 8, R36_4_3),
    "orin_nx_16_super": jetson(f"{NX} Super", "p3767-0000", "p3768-0000", 15.3, 8, R36_4_3),
    "orin_nx_8": jetson(NX, "p3767-0001", "p3768-0000", 7.4, 6, R36_4_3),
    "orin_nx_8_jetpack_5": jetson("NVIDIA Orin NX Developer Kit", "p3767-0001", "p3768-0000", 7.2, 6, R35_4_1),
    "orin_nano_8": jetson(NANO, "p3767-0003", "p3768-0000", 7.4, 6, R36_4_3),
    "orin_nano_4": jetson(NANO, "p3767-0004", "p3768-0000", 3.6, 6, R36_4_3),
    "orin_nano_devkit": jetson(f"{NANO} Super", "p3767-0005", "p3768-0000", 7.4, 6, R36_4_3),
    "agx_orin_32": jetson("NVIDIA Jetson AGX Orin Developer Kit", "p3701-0004", "p3737-0000", 29.9, 8, R36_4_3),
    "agx_orin_64": jetson("NVIDIA Jetson AGX Orin Developer Kit", "p3701-0005", "p3737-0000", 61.3, 12, R36_4_3),
    "orin_unknown_module": jetson(NX, "p3767-0099", "p3768-0000", 15.3, 8, None),
    "cpu_vnni": {
        "proc/cpuinfo": x86_cpuinfo(2, VNNI_FLAGS, "Intel(R) Xeon(R) Processor").encode(),
        "proc/meminfo": meminfo(23.5, 21).encode(),
    },
    "cpu_avx2": {
        "proc/cpuinfo": x86_cpuinfo(8, AVX2_FLAGS, "Intel(R) Core(TM) i7-7700K CPU @ 4.20GHz").encode(),
        "proc/meminfo": meminfo(31.3, 24).encode(),
    },
    "cpu_arm": {"proc/cpuinfo": arm_cpuinfo(4, "fp asimd", "0xd08").encode(), "proc/meminfo": meminfo(4, 3).encode()},
    "cpu_sse": {
        "proc/cpuinfo": x86_cpuinfo(2, SSE_FLAGS, "Intel(R) Atom(TM) CPU C2558 @ 2.40GHz").encode(),
        "proc/meminfo": meminfo(7.7, 6).encode(),
    },
    "cpu_arm_dot_product": {
        "proc/cpuinfo": arm_cpuinfo(64, ORIN_FEATURES, "0xd0c").encode(),
        "proc/meminfo": meminfo(125, 120).encode(),
    },
    "rtx_4090": {
        "proc/cpuinfo": x86_cpuinfo(32, ZEN_4_FLAGS, "AMD Ryzen 9 7950X 16-Core Processor").encode(),
        "proc/meminfo": meminfo(62.6, 55).encode(),
        "proc/driver/nvidia/version": b"NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14\n",
    },
    "h200": {
        "proc/cpuinfo": x86_cpuinfo(192, VNNI_FLAGS, "Intel(R) Xeon(R) Platinum 8468").encode(),
        "proc/meminfo": meminfo(2015, 1900).encode(),
        "proc/driver/nvidia/version": b"NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15\n",
    },
    "unknown": {},
}

GPUS: dict[str, Gpu] = {
    "rtx_4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24564 * 2**20, "550.54.14", 24100 * 2**20),
    "h200": Gpu("NVIDIA H200", (9, 0), 143771 * 2**20, "550.54.15", 143000 * 2**20),
}
"""What NVML says on these devices (names, capabilities and MiB in total are published; what is free is made up)."""


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """Return a factory that writes the tree of a named device and returns its root."""

    def write(name: str) -> Path:
        root = tmp_path / f"tree_{name}"
        root.mkdir(exist_ok=True)
        for path, data in TREES[name].items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    return write


@pytest.fixture
def recorded(tree: Callable[[str], Path]) -> Callable[[str], Device]:
    """Return a factory that detects a named device from its tree, and its GPU from what NVML says there."""

    def find(name: str) -> Device:
        gpus = (lambda: ((GPUS[name],), ())) if name in GPUS else None
        return detect(tree(name), gpus)

    return find
