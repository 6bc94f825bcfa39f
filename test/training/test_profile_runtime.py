"""Runtimes that tables are measured on: what each executes, what is missing is named, any can be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.devices.detect import Device, Gpu, detect
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.engines import RUNTIMES
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training import profile_networks, profile_runtime
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.profile import measure
from training.profile_conditions import clocks, gpu_clocks, processor_clocks
from training.profile_graphs import FLOAT, FP8, HALF, INTEGER, INTEGER_A4, DiffusionPolicyTGraphs
from training.profile_runtime import ProfiledRuntime, profiled_runtime
from training.profile_table import DIFFUSION, ProfileSettings
from training.profile_timing import BURST
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Precision

INFERS_ON_OPENVINO = True  # see test/conftest.py

POLICY = DiffusionPolicyTConfig(depth=2, heads=2, dim=32, ffn_ratio=2, horizon=6)
SPACE = SearchSpace(
    diffusion_policy_t_shape(POLICY, 5),
    SpaceConfig(
        min_depth={"decoder": 1},
        head_ratios=(0.5, 1.0),
        mlp_ratios=(1.0,),
        precisions=(Precision.FP32, Precision.FP16, Precision.FP8),
    ),
)
TWO_STEPS = DIFFUSION.model_copy(update={"steps": 2})


def with_gpu(capability: tuple[int, int]) -> Device:
    return replace(detect(), kind="gpu", gpu=Gpu("made up", capability, 2**34, "999.9"))


def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_runtime, "distribution_version", lambda name: "1.2.3")


def test_a_missing_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="runtime 'abacus' is unknown; there are onnxruntime, openvino"):
        profiled_runtime("abacus", detect())
    monkeypatch.setattr(profile_runtime, "distribution_version", lambda name: None)
    with pytest.raises(EngineError, match="runtime tensorrt: the Python package tensorrt is not installed: "):
        profiled_runtime("tensorrt", with_gpu((8, 7)))


@pytest.mark.parametrize("name", [name for name, facts in RUNTIMES.items() if facts.runs_on == "gpu"])
def test_a_runtime_for_gpus_needs_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(EngineError, match=f"runtime {name}: no CUDA device on this computer"):
        profiled_runtime(name, replace(detect(), gpu=None))


def test_what_a_gpu_executes_follows_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    orin, ada = (profiled_runtime("tensorrt", with_gpu(capability)) for capability in ((8, 7), (8, 9)))
    assert {p: form.executed for p, form in ada.forms.items()} == {
        Precision.INT: INTEGER,
        Precision.FP32: FLOAT,
        Precision.FP16: HALF,
        Precision.FP8: FP8,
    }
    assert orin.forms[Precision.FP8].executed == HALF
    assert any("8.7 has no fp8" in note for note in orin.notes)
    assert any("never executed by its authors" in note for note in ada.notes)
    assert ada.versions["driver"] == "999.9"


@pytest.mark.parametrize(
    ("capability", "executed"), [((8, 7), (INTEGER, FLOAT, HALF)), ((8, 9), (INTEGER, FLOAT, HALF, FP8))]
)
def test_every_executed_form_of_a_gpu_is_measured(
    capability: tuple[int, int], executed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in: ONNX Runtime's engine in place of TensorRT's. No GPU has executed this."""
    installed(monkeypatch)
    opened = []

    def opens(files: Mapping[str, bytes], threads: int) -> Engine:
        opened.append(threads)
        return OnnxRuntimeEngine(files)

    monkeypatch.setattr(profile_networks, "engine_growth", lambda *args: 10_000_000)
    runtime = replace(profiled_runtime("tensorrt", with_gpu(capability)), opens=opens)
    settings = ProfileSettings(name="gpu", runs=BURST, warm_ups=0, subnets=2, diffusion=TWO_STEPS)
    table = measure(SPACE, DiffusionPolicyTGraphs(POLICY, 5), settings, runtime=runtime)
    table.check(SPACE)
    assert opened
    assert table.runtime == "tensorrt"
    assert {entry.executed for entry in table.blocks} == {*executed, INTEGER_A4}
    assert len(table.validation) == len(executed)
    assert {f.executed: f.stored_bits for f in table.forms if f.precision is Precision.FP16} == {HALF: 16}


def test_openvino_is_measured_on_its_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="not exercised: OpenVINO is not installed (requirements/openvino.txt)")
    runtime: ProfiledRuntime = profiled_runtime("openvino", detect())
    settings = ProfileSettings(name="ov", runs=BURST, warm_ups=0, subnets=0, diffusion=TWO_STEPS)
    space = SearchSpace(SPACE.shape, SPACE.config.model_copy(update={"precisions": ()}))
    table = measure(space, DiffusionPolicyTGraphs(POLICY, 5), settings, runtime=runtime)
    table.check(space)
    assert table.runtime == "openvino"
    assert set(table.versions) == {"openvino", "numpy"}
    assert table.workspace_bytes > 0


def test_clocks_are_read_where_the_system_tells_them(tmp_path: Path) -> None:
    assert processor_clocks(tmp_path) == "governor hidden, frequency unknown"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\ncpu MHz\t\t: 2600.000\n")
    assert processor_clocks(tmp_path) == "governor hidden, 2600 MHz"
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_governor").write_text("performance\n")
    (folder / "scaling_cur_freq").write_text("3500000\n")
    assert clocks(False, tmp_path) == "clocks: performance, 3500 MHz"
    assert clocks(True, tmp_path).startswith("clocks: performance, 3500 MHz; GPU ")


def test_clocks_of_a_gpu_come_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        NVMLError = RuntimeError
        NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

        def __getattr__(self, name: str) -> Any:
            return {
                "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1500, 2: 2600}[kind],
                "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
            }.get(name, lambda *args: None)

    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml())
    assert gpu_clocks() == "GPU 1500 of at most 1980 MHz, its memory 2600 MHz"
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert gpu_clocks() == "GPU clocks unknown: nvidia-ml-py is not installed"
