"""A precision is executed where the documents say so and refused with the reason everywhere else."""

from __future__ import annotations

import pytest

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.devices.capabilities import PRECISIONS, Runtime, installed_version, runtimes
from dcqfa_ros.devices.detect import Gpu, detect


def runtime(device, name: str) -> Runtime:
    return next(r for r in runtimes(device, lambda _: "1.0") if r.name == name)


@pytest.mark.parametrize(
    ("device", "executed"),
    [
        ("cpu_vnni", {"fp32", "w8a8", "w4a16"}),
        ("cpu_avx2", {"fp32", "w8a8", "w4a16"}),
        ("cpu_arm", {"fp32", "w4a16"}),
        ("orin_nx_8", {"fp32", "w8a8", "w4a16"}),
        ("unknown", {"fp32", "w4a16"}),
    ],
)
def test_onnx_runtime_on_the_processor(recorded, device: str, executed: set[str]) -> None:
    precisions = runtime(recorded(device), "onnxruntime").precisions()
    assert {name for name, answer in precisions.items() if answer == "yes"} == executed
    assert set(precisions) == set(PRECISIONS)


def test_exact_products_on_x86_need_avx2_and_take_longer_without_vnni(recorded, tree) -> None:
    slow, fast = (runtime(recorded(name), "onnxruntime") for name in ("cpu_avx2", "cpu_vnni"))
    assert fast.relative_time(PRECISIONS["w8a8"]) < slow.relative_time(PRECISIONS["w8a8"]) == 0.6
    assert slow.relative_time(PRECISIONS["fp32"]) == 1.0
    root = tree("cpu_avx2")
    file = root / "proc/cpuinfo"
    file.write_text(file.read_text().replace("avx2", "sse4_2"))
    assert "neither VNNI nor AVX2" in runtime(detect(root), "onnxruntime").precisions()["w8a8"]


@pytest.mark.parametrize(
    ("capability", "executed"),
    [
        ((6, 1), {"fp32", "fp16"}),
        ((7, 5), {"fp32", "fp16", "w8a8"}),
        ((8, 7), {"fp32", "fp16", "w8a8", "w4a16"}),
        ((8, 9), {"fp32", "fp16", "w8a8", "w4a16", "fp8"}),
        ((9, 0), {"fp32", "fp16", "w8a8", "w4a16", "fp8"}),
        ((10, 0), {"fp32", "fp16", "w8a8", "w4a16", "fp8", "fp4"}),
    ],
)
def test_tensorrt_by_compute_capability(tree, capability: tuple[int, int], executed: set[str]) -> None:
    device = detect(tree("cpu_vnni"), lambda: ((Gpu("GPU", capability, 2**33, "550"),), ()))
    precisions = runtime(device, "tensorrt").precisions()
    assert {name for name, answer in precisions.items() if answer == "yes"} == executed


def test_orin_refuses_fp8_with_both_numbers(recorded) -> None:
    refusal = runtime(recorded("orin_nx_16"), "tensorrt").precisions()["fp8"]
    assert refusal == "FP8: needs compute capability 8.9, this GPU has 8.7"


def test_the_runtime_that_can_run_comes_first(recorded) -> None:
    first, second = runtimes(recorded("orin_nx_16"), lambda _: "1.0")
    assert (first.name, first.unavailable, second.name) == ("onnxruntime", None, "tensorrt")
    assert second.unavailable is not None
    assert "no TensorRT engine" in second.unavailable


def test_a_runtime_that_is_not_installed_is_unavailable(recorded) -> None:
    (cpu,) = runtimes(recorded("cpu_vnni"), lambda _: None)
    assert cpu.unavailable is not None
    assert "onnxruntime is not installed" in cpu.unavailable


def test_mixed_layers_are_judged_by_their_own_bits(recorded) -> None:
    cpu = runtime(recorded("cpu_vnni"), "onnxruntime")
    assert cpu.refuses(Bits(weight=8, activation=32, kind="int")) is None
    assert cpu.refuses(Bits(weight=16, activation=8, kind="int")) is not None
    assert cpu.relative_time(Bits(weight=8, activation=8, kind="int")) < cpu.relative_time(PRECISIONS["w4a16"])


def test_versions_come_from_package_metadata() -> None:
    assert installed_version("numpy")
    assert installed_version("a-package-nobody-has") is None
