"""Detection names the device, its memory, release and 8-bit support from the files of a recorded tree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcqfa_ros.devices.detect import Gpu, detect


@pytest.mark.parametrize(
    ("tree_name", "name", "l4t"),
    [
        ("orin_nx_16", "Jetson Orin NX 16 GB", "36.4.3"),
        ("orin_nx_16_super", "Jetson Orin NX 16 GB Super", "36.4.3"),
        ("orin_nx_8", "Jetson Orin NX 8 GB", "36.4.3"),
        ("orin_nx_8_jetpack_5", "Jetson Orin NX 8 GB", "35.4.1"),
        ("orin_nano_8", "Jetson Orin Nano 8 GB", "36.4.3"),
        ("orin_nano_4", "Jetson Orin Nano 4 GB", "36.4.3"),
        ("orin_nano_devkit", "Jetson Orin Nano developer kit 8 GB Super", "36.4.3"),
        ("agx_orin_32", "Jetson AGX Orin 32 GB", "36.4.3"),
        ("agx_orin_64", "Jetson AGX Orin 64 GB", "36.4.3"),
    ],
)
def test_jetson_modules_are_told_apart_by_their_number(recorded, tree_name: str, name: str, l4t: str) -> None:
    device = recorded(tree_name)
    assert (device.kind, device.name, device.l4t, device.notes) == ("jetson", name, l4t, ())
    assert device.gpu == Gpu("Orin (nvgpu)", (8, 7), None, None)
    assert (device.processor.architecture, device.processor.model) == ("aarch64", "Cortex-A78AE")
    assert device.processor.features == ("asimddp",)


def test_every_recorded_device_has_its_own_fingerprint(recorded) -> None:
    names = ["orin_nx_16", "orin_nx_8", "orin_nx_8_jetpack_5", "orin_nano_8", "agx_orin_64", "cpu_vnni", "cpu_avx2"]
    names += ["rtx_4090", "h200", "cpu_sse", "cpu_arm", "cpu_arm_dot_product"]
    assert len({recorded(name).fingerprint for name in names}) == len(names)


def test_an_unknown_module_is_named_and_its_memory_measured(recorded) -> None:
    device = recorded("orin_unknown_module")
    assert device.kind == "jetson"
    assert device.name.endswith("15 GB")
    assert device.l4t is None
    assert any("p3767-0099" in note for note in device.notes)
    assert any("nv_tegra_release" in note for note in device.notes)
    assert any("power mode is unknown" in note for note in device.notes)
    assert device.fingerprint.endswith("power mode unknown")


def test_power_modes_of_one_module_are_told_apart(tree) -> None:
    root = tree("orin_nx_16")
    first = detect(root).fingerprint
    (root / "var/lib/nvpmodel/status").write_text("pmode:0000")
    second = detect(root).fingerprint
    assert first.endswith("power mode 2") and second.endswith("power mode 0")


def test_a_processor_with_vnni_says_so(recorded) -> None:
    device = recorded("cpu_vnni")
    assert (device.kind, device.gpu, device.processor.cores) == ("cpu", None, 2)
    assert device.processor.features == ("amx_int8", "avx512_vnni", "avx_vnni")
    assert "amx_int8" in device.fingerprint
    assert "2 cores" in device.fingerprint
    assert "family 6 model 158" in device.name, "a nameless virtual processor is told apart by its model number"


def test_a_processor_without_vnni_says_so(recorded) -> None:
    device = recorded("cpu_avx2")
    assert device.processor.features == ()
    assert device.processor.avx2
    assert "no 8-bit dot product" in device.fingerprint
    assert device.name == "Intel(R) Core(TM) i7-7700K CPU @ 4.20GHz"


@pytest.mark.parametrize(
    ("tree_name", "name", "capability", "gib"),
    [
        ("rtx_4090", "NVIDIA GeForce RTX 4090 with AMD Ryzen 9 7950X 16-Core Processor", (8, 9), 24.0),
        ("h200", "NVIDIA H200 with Intel(R) Xeon(R) Platinum 8468", (9, 0), 140.4),
    ],
)
def test_gpus_are_described_by_nvml(recorded, tree_name: str, name: str, capability: tuple, gib: float) -> None:
    device = recorded(tree_name)
    assert (device.kind, device.name, device.notes) == ("gpu", name, ())
    assert device.gpu.compute_capability == capability
    assert device.gpu.memory_bytes / 2**30 == pytest.approx(gib, abs=0.1)
    assert device.fingerprint.startswith(f"{device.gpu.name} | x86_64")


def test_free_memory_of_the_gpu_does_not_change_the_fingerprint(tree) -> None:
    gpu = Gpu("NVIDIA H200", (9, 0), 140 * 2**30, "550", 130 * 2**30)
    busy = dataclasses.replace(gpu, memory_available_bytes=2**30)
    root = tree("h200")
    assert detect(root, lambda: ((gpu,), ())).fingerprint == detect(root, lambda: ((busy,), ())).fingerprint


def test_a_recorded_driver_without_its_gpu_is_noted(tree) -> None:
    device = detect(tree("rtx_4090"))
    assert device.gpu is None
    assert any("only NVML does" in note for note in device.notes)


def test_arm_servers_are_told_from_boards_without_dot_product(recorded) -> None:
    server, board = recorded("cpu_arm_dot_product").processor, recorded("cpu_arm").processor
    assert (server.model, server.features) == ("Neoverse-N1", ("asimddp",))
    assert (board.model, board.features) == ("Cortex-A72", ())


def test_an_old_x86_processor_has_neither_vnni_nor_avx2(recorded) -> None:
    processor = recorded("cpu_sse").processor
    assert (processor.architecture, processor.features, processor.avx2) == ("x86_64", (), False)


def test_memory_is_that_of_meminfo_in_bytes(recorded) -> None:
    device = recorded("cpu_vnni")
    assert device.memory_bytes == pytest.approx(23.5 * 2**30, rel=1e-6)
    assert device.memory_available_bytes == pytest.approx(21 * 2**30, rel=1e-6)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max\n", "memory.current": "1000\n"}, 21 * 2**30),
        ({"memory.max": f"{2**30}\n", "memory.current": f"{2**28}\n"}, 2**30 - 2**28),
        ({"memory.max": f"{2**40}\n", "memory.current": "0\n"}, 21 * 2**30),
        ({"memory.max": "100\n", "memory.current": "200\n"}, 1),
        (
            {
                "memory.max": "1000\n",
                "memory.current": "900\n",
                "memory.stat": "anon 100\nfile 800\ninactive_file 700\nactive_file 100\n",
            },
            800,
        ),
        ({"memory.max": "500\n", "memory.current": "100\n", "memory.stat": "inactive_file 300\n"}, 500),
        ({"a/memory.max": "500\n", "a/memory.current": "100\n"}, 400),
        ({"a/b/memory.max": "max", "a/b/memory.current": "7", "memory.max": "90", "memory.current": "7"}, 83),
    ],
)
def test_available_memory_is_what_the_control_group_grants(tree, files: dict[str, str], expected: int) -> None:
    root = tree("cpu_vnni")
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/../a/b\n")
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert detect(root).memory_available_bytes == expected


def test_an_unknown_device_is_described_with_what_is_missing(recorded) -> None:
    device = recorded("unknown")
    assert (device.kind, device.memory_bytes, device.processor.cores) == ("cpu", 0, 0)
    assert "unknown" in device.fingerprint
    assert len(device.notes) == 2


def test_a_cuda_device_comes_from_the_probe(tree) -> None:
    gpu = Gpu("NVIDIA RTX 4090", (8, 9), 24 * 2**30, "550.54")
    device = detect(tree("cpu_vnni"), lambda: ((gpu, gpu), ("a note",)))
    assert (device.kind, device.gpu) == ("gpu", gpu)
    assert device.fingerprint.startswith("NVIDIA RTX 4090 | x86_64")
    assert device.notes == ("a note", "2 CUDA devices: the first is described")


def test_this_computer_is_detected_the_same_way_twice() -> None:
    first, second = detect(), detect()
    assert first.processor.cores >= 1
    assert first.memory_bytes > 0
    assert dataclasses.replace(first, memory_available_bytes=0) == dataclasses.replace(second, memory_available_bytes=0)


@given(
    st.dictionaries(st.sampled_from(["cpuinfo", "meminfo", "device-tree/model", "device-tree/compatible"]), st.binary())
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_never_raise(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    root: Path = tmp_path_factory.mktemp("damaged")
    for name, data in files.items():
        (root / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "proc" / name).write_bytes(data)
    assert detect(root).fingerprint
