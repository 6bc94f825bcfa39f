"""Recorded file trees of the devices this software meets, built from their documented contents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dcqfa_ros.devices.detect import Device, detect

GIB_IN_KB = 2**20

ORIN_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
VNNI_FLAGS = "fpu sse4_1 avx2 avx512f avx512_vnni avx_vnni amx_int8"
AVX2_FLAGS = "fpu sse4_1 avx2 fma"


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
    "unknown": {},
}


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
    """Return a factory that detects a named device from its tree."""
    return lambda name: detect(tree(name))
