"""A precision is executed where the documents say so, in the bits that are said, and refused with the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dcqfa_ros.bundle.schema import Bits
from dcqfa_ros.devices.capabilities import Runtime, runtimes
from dcqfa_ros.devices.detect import Gpu, detect
from dcqfa_ros.devices.modelled import MODELS
from dcqfa_ros.devices.precisions import PRECISIONS
from dcqfa_ros.runtime.engines import RUNTIMES

AS_FP32 = {"fp16": "fp32", "fp8": "fp32", "w4a16": "fp32"}
"""What ONNX Runtime computes in FP32."""


def installed(_: str) -> str:
    return "11.0"


def runtime(device, name: str, version=installed, without_cuda=bool) -> Runtime:
    return next(r for r in runtimes(device, version, without_cuda) if r.name == name)


def native(found: Runtime) -> set[str]:
    """Return the precisions that are executed in their own bits."""
    return {name for name, answer in found.precisions().items() if answer == "yes"}


def replaced(found: Runtime) -> dict[str, str]:
    """Return those that are executed in others: name -> the others' name."""
    answers = found.precisions()
    return {
        name: answer.split(":")[0].removeprefix("as ") for name, answer in answers.items() if answer.startswith("as ")
    }


@pytest.mark.parametrize(
    ("device", "in_own_bits", "in_others"),
    [
        ("cpu_vnni", {"fp32", "w8a8"}, {**AS_FP32, "w4a4": "w8a8"}),
        ("cpu_avx2", {"fp32", "w8a8"}, {**AS_FP32, "w4a4": "w8a8"}),
        ("cpu_sse", {"fp32"}, AS_FP32),
        ("cpu_arm", {"fp32"}, AS_FP32),
        ("cpu_arm_dot_product", {"fp32", "w8a8"}, {**AS_FP32, "w4a4": "w8a8"}),
        ("orin_nx_8", {"fp32", "w8a8"}, {**AS_FP32, "w4a4": "w8a8"}),
        ("unknown", {"fp32"}, AS_FP32),
    ],
)
def test_onnx_runtime_on_the_processor(recorded, device: str, in_own_bits: set, in_others: dict) -> None:
    found = runtime(recorded(device), "onnxruntime")
    assert (native(found), replaced(found)) == (in_own_bits, in_others)
    assert set(found.precisions()) == set(PRECISIONS)


@pytest.mark.parametrize(
    ("device", "refusal"),
    [("cpu_vnni", None), ("cpu_avx2", "can saturate"), ("cpu_arm_dot_product", "for x86 only, this is aarch64")],
)
def test_openvino_multiplies_8_bits_only_where_it_is_exact(recorded, device: str, refusal: str | None) -> None:
    found = runtime(recorded(device), "openvino")
    for name in ("w8a8", "w4a4"):
        answer = found.refuses(PRECISIONS[name])
        assert answer is None if refusal is None else (answer is not None and refusal in answer)
    assert replaced(found)["w4a16"] == "fp32"
    assert "rounds 8-bit floats differently" in found.precisions()["fp8"]


def test_exact_products_on_x86_need_avx2_and_take_longer_without_vnni(recorded) -> None:
    slow, fast = (runtime(recorded(name), "onnxruntime") for name in ("cpu_avx2", "cpu_vnni"))
    assert fast.relative_time(PRECISIONS["w8a8"]) < slow.relative_time(PRECISIONS["w8a8"]) == 0.6
    assert slow.relative_time(PRECISIONS["fp32"]) == 1.0
    assert "neither VNNI nor AVX2" in runtime(recorded("cpu_sse"), "onnxruntime").precisions()["w8a8"]


@pytest.mark.parametrize(
    ("capability", "executed"),
    [
        ((6, 1), set()),
        ((7, 5), {"fp32", "fp16", "w8a8"}),
        ((8, 7), {"fp32", "fp16", "w8a8", "w4a16"}),
        ((8, 9), {"fp32", "fp16", "w8a8", "w4a16", "fp8"}),
        ((9, 0), {"fp32", "fp16", "w8a8", "w4a16", "fp8"}),
        ((10, 0), {"fp32", "fp16", "w8a8", "w4a16", "fp8", "fp4"}),
    ],
)
def test_tensorrt_by_compute_capability(tree, capability: tuple[int, int], executed: set[str]) -> None:
    device = detect(tree("cpu_vnni"), lambda: ((Gpu("GPU", capability, 2**33, "550"),), ()))
    found = runtime(device, "tensorrt")
    assert native(found) == executed
    assert replaced(found) == ({"w4a4": "w8a8"} if "w8a8" in executed else {})
    assert (found.unavailable is None) == bool(executed)


@pytest.mark.parametrize(
    ("capability", "executed"),
    [
        ((7, 0), set()),
        ((7, 5), {"fp32", "fp16", "w8a8"}),
        ((8, 7), {"fp32", "fp16", "w8a8"}),
        ((8, 9), {"fp32", "fp16", "w8a8", "fp8"}),
    ],
)
def test_the_torch_engine_by_compute_capability(tree, capability: tuple[int, int], executed: set[str]) -> None:
    device = detect(tree("cpu_vnni"), lambda: ((Gpu("GPU", capability, 2**33, "550"),), ()))
    found = runtime(device, "torch_cuda")
    assert native(found) == executed
    if executed:
        assert replaced(found) == {"w4a4": "w8a8", "w4a16": "fp32"}


@pytest.mark.parametrize("name", ["tensorrt", "torch_cuda"])
@pytest.mark.parametrize("device", ["orin_nx_16", "orin_nano_8", "agx_orin_64"])
def test_orin_refuses_fp8_with_both_numbers(recorded, device: str, name: str) -> None:
    refusal = runtime(recorded(device), name).precisions()["fp8"]
    assert refusal == "FP8: needs compute capability 8.9, this GPU has 8.7"


@pytest.mark.parametrize(("device", "runs"), [("rtx_4090", True), ("orin_nx_16", False), ("h200", False)])
def test_tensorrt_rtx_runs_on_desktop_gpus_only(recorded, device: str, runs: bool) -> None:
    found = runtime(recorded(device), "tensorrt_rtx")
    assert (found.unavailable is None) == runs
    assert ("w8a8" in native(found)) == runs
    if not runs:
        assert "7.5, 8.0, 8.6, 8.9, 12.0, 12.1 only" in found.unavailable


@pytest.mark.parametrize("device", ["rtx_4090", "h200"])
def test_gpus_with_fp8_execute_it_in_the_torch_engine_and_tensorrt(recorded, device: str) -> None:
    assert all("fp8" in native(runtime(recorded(device), name)) for name in ("tensorrt", "torch_cuda"))


def test_every_runtime_is_listed_with_what_keeps_it_from_running(recorded) -> None:
    found = {r.name: r for r in runtimes(recorded("cpu_vnni"), lambda _: None)}
    assert list(found) == list(RUNTIMES) == list(MODELS)
    for name in ("onnxruntime", "openvino"):
        assert "is not installed: pip install" in found[name].unavailable
    for name in ("tensorrt", "tensorrt_rtx", "torch_cuda"):
        assert "CUDA device" in found[name].unavailable
        assert "compiled, never executed by its authors" in found[name].caveat
        assert found[name].executed_precisions() == ()


def test_a_missing_package_on_a_gpu_says_what_to_install(recorded) -> None:
    found = {r.name: r.unavailable for r in runtimes(recorded("rtx_4090"), lambda _: None)}
    assert "JetPack" in found["tensorrt"]
    assert "pip install --no-deps -r requirements/tensorrt_rtx.txt" in found["tensorrt_rtx"]
    assert "torch with CUDA" in found["torch_cuda"]


def test_a_build_of_torch_for_processors_cannot_run_on_a_gpu(recorded) -> None:
    found = runtime(recorded("rtx_4090"), "torch_cuda", lambda _: "2.13.0+cpu")
    assert "torch 2.13.0+cpu is a build without CUDA" in found.unavailable
    assert runtime(recorded("rtx_4090"), "torch_cuda", lambda _: "2.13.0").unavailable is None
    plain = runtime(recorded("rtx_4090"), "torch_cuda", lambda _: "2.13.0", lambda: True)
    assert "torch 2.13.0 is a build without CUDA" in plain.unavailable


@pytest.mark.parametrize(("version", "runs"), [("8.6.1", False), ("10.2.0", False), ("10.3.0", True), ("11.0", True)])
def test_a_tensorrt_that_the_engine_refuses_is_not_offered(recorded, version: str, runs: bool) -> None:
    found = runtime(recorded("orin_nx_16"), "tensorrt", lambda _: version)
    assert (found.unavailable is None) == runs
    if not runs:
        assert f"expected tensorrt 10.3 or newer, found {version}: on a Jetson install" in found.unavailable


@pytest.mark.parametrize(("name", "weight_only"), [("tensorrt", "w4a16"), ("torch_cuda", "fp16")])
def test_a_reduced_variant_has_no_layer_in_fp32_on_a_gpu(recorded, name: str, weight_only: str) -> None:
    found = runtime(recorded("rtx_4090"), name)
    assert found.executes(PRECISIONS["fp32"], True).bits == PRECISIONS["fp16"]
    assert "FP16" in found.executes(PRECISIONS["fp32"], True).note
    assert found.executes(PRECISIONS["fp32"]).bits == PRECISIONS["fp32"]
    assert found.executes(PRECISIONS["w4a16"], True).bits == PRECISIONS[weight_only]
    assert runtime(recorded("rtx_4090"), "openvino").executes(PRECISIONS["fp32"], True).bits == PRECISIONS["fp32"]


def test_mixed_layers_are_judged_by_their_own_bits(recorded) -> None:
    cpu = runtime(recorded("cpu_vnni"), "onnxruntime")
    assert cpu.refuses(Bits(weight=8, activation=32, kind="int")) is None
    assert cpu.refuses(Bits(weight=16, activation=8, kind="int")) is not None
    assert cpu.executes(Bits(weight=4, activation=8, kind="int")).bits == PRECISIONS["w8a8"]
    assert cpu.executes(Bits(weight=4, activation=16, kind="int")).bits == PRECISIONS["fp32"]


def test_modelled_times_say_where_they_come_from(recorded) -> None:
    for found in runtimes(recorded("rtx_4090"), installed):
        document = found.as_dict()
        assert document["time_source"]
        assert set(document["modelled_time"]) == set(document["executes"])
        assert document["modelled_time"]["w8a8"] < document["modelled_time"]["fp32"]


def test_describing_runtimes_imports_none_of_them() -> None:
    code = (
        "import sys\n"
        "from dcqfa_ros.devices.capabilities import runtimes\n"
        "from dcqfa_ros.devices.detect import detect\n"
        "[r.as_dict() for r in runtimes(detect())]\n"
        "print({'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx_bindings', 'torch'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert answer.stdout.strip().endswith("set()")
