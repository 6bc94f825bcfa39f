"""Health tells what a device tells, names what it does not, and makes nothing up."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcqfa_ros.devices.gpu_health import GpuHealth, NvmlProbe
from dcqfa_ros.devices.health import HealthReader
from test.devices.conftest import meminfo

STAT = "cpu  100 0 100 800 0 0 0 {steal} 0 0\ncpu0 50 0 50 400 0 0 0 0 0 0\ncpu1 50 0 50 400 0 0 0 0 0 0\nintr 1\n"
PRESSURE = "some avg10={avg:.2f} avg60=0.10 avg300=0.00 total={total}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
PROC = {
    "proc/meminfo": meminfo(15.3, 6.0),
    "proc/loadavg": "1.25 0.90 0.70 2/345 6789\n",
    "proc/stat": STAT.format(steal=0),
    "proc/pressure/cpu": PRESSURE.format(avg=5.0, total=1_000_000),
}
ZONES, COOLING, CPU = "sys/class/thermal/thermal_zone", "sys/class/thermal/cooling_device", "sys/devices/system/cpu"
ORIN_NX = {
    **PROC,
    f"{ZONES}0/type": "cpu-thermal\n",
    f"{ZONES}0/temp": "61250\n",
    f"{ZONES}0/trip_point_0_type": "passive\n",
    f"{ZONES}0/trip_point_0_temp": "99000\n",
    f"{ZONES}0/trip_point_1_type": "critical\n",
    f"{ZONES}0/trip_point_1_temp": "104500\n",
    f"{ZONES}1/type": "gpu-thermal\n",
    f"{ZONES}1/temp": "-256000\n",  # the GPU is switched off
    f"{ZONES}2/type": "cv0-thermal\n",  # the accelerator is, and its file gives nothing
    f"{ZONES}8/type": "tj-thermal\n",
    f"{ZONES}8/temp": "62000\n",
    f"{ZONES}8/trip_point_0_type": "active\n",
    f"{ZONES}8/trip_point_0_temp": "40000\n",
    f"{COOLING}0/type": "pwm-fan\n",
    f"{COOLING}0/cur_state": "2\n",
    f"{COOLING}0/max_state": "3\n",
    f"{COOLING}1/type": "thermal-cpufreq-0\n",
    f"{COOLING}1/cur_state": "0\n",
    f"{COOLING}1/max_state": "20\n",
    f"{CPU}/cpufreq/policy0/scaling_cur_freq": "729600\n",
    f"{CPU}/cpufreq/policy0/scaling_max_freq": "1984000\n",
    f"{CPU}/cpufreq/policy0/cpuinfo_max_freq": "1984000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
    "sys/class/hwmon/hwmon0/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon0/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon0/oc1_throt_en": "1\n",
    "sys/class/hwmon/hwmon0/oc2_event_cnt": "7\n",
    "sys/class/hwmon/hwmon0/oc2_throt_en": "0\n",
}
DESKTOP = {
    **PROC,
    f"{ZONES}0/type": "x86_pkg_temp\n",
    f"{ZONES}0/temp": "47000\n",
    f"{ZONES}0/trip_point_0_type": "passive\n",
    f"{ZONES}0/trip_point_0_temp": "0\n",  # not set
    f"{COOLING}0/type": "Processor\n",
    f"{COOLING}0/cur_state": "0\n",
    f"{COOLING}0/max_state": "10\n",
    f"{COOLING}1/type": "TCC Offset\n",  # a fixed setting
    f"{COOLING}1/cur_state": "3\n",
    f"{COOLING}1/max_state": "63\n",
    f"{COOLING}2/type": "intel_powerclamp\n",
    f"{COOLING}2/cur_state": "-1\n",
    f"{COOLING}2/max_state": "50\n",
    f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "12\n",
    f"{CPU}/cpu0/thermal_throttle/package_throttle_count": "40\n",
    f"{CPU}/cpu1/thermal_throttle/package_throttle_count": "40\n",
    "sys/class/hwmon/hwmon3/name": "coretemp\n",
    "sys/class/hwmon/hwmon3/temp1_input": "48000\n",
    "sys/class/hwmon/hwmon3/temp1_label": "Package id 0\n",
    "sys/class/hwmon/hwmon3/temp1_max": "84000\n",
    "sys/class/hwmon/hwmon4/name": "nvme\n",
    "sys/class/hwmon/hwmon4/temp1_input": "90000\n",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_jetson_tells_its_temperatures_and_their_limits(tmp_path: Path) -> None:
    health = HealthReader(write(tmp_path, ORIN_NX)).read()
    assert [(t.sensor, t.celsius, t.limit) for t in health.temperatures] == [
        ("cpu-thermal", 61.25, 99.0),
        ("tj-thermal", 62.0, None),
    ]
    assert health.hottest is not None and health.hottest.sensor == "cpu-thermal", "the one closest to its limit"
    assert (health.throttled, health.throttling) == (False, ())
    assert health.absent == ("no temperature of gpu-thermal, cv0-thermal: switched off or unreadable",)
    assert health.memory_available_bytes == 6 * 2**30
    assert health.cpu_frequency_share == pytest.approx(0.368, abs=1e-3)
    assert (health.load_1min, health.processors) == (1.25, 2)
    figures = health.figures()
    assert (figures["temperature_c"], figures["temperature_limit_c"]) == ("61.2", "99.0")
    assert (figures["throttled"], figures["memory_free_mb"]) == ("false", "6144")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({f"{COOLING}1/cur_state": "4\n"}, "cooling device thermal-cpufreq-0 at 4 of 20"),
        ({"sys/class/hwmon/hwmon0/oc1_event_cnt": "3\n"}, "over-current events oc1: 3 more"),
        ({f"{CPU}/cpufreq/policy0/scaling_max_freq": "1190400\n"}, "processors policy0 fell to 1.19 from 1.98 GHz"),
        ({"sys/class/devfreq/17000000.gpu/max_freq": "306000000\n"}, "the GPU fell to 0.31 from 0.92 GHz"),
    ],
)
def test_a_jetson_that_slows_itself_down_says_by_what(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    reader = HealthReader(write(tmp_path, ORIN_NX))
    write(tmp_path, changed)
    health = reader.read()
    assert health.throttled is True
    assert words in "; ".join(health.throttling)


@pytest.mark.parametrize("changed", [{"sys/class/hwmon/hwmon0/oc2_event_cnt": "9\n"}, {f"{COOLING}0/cur_state": "3\n"}])
def test_what_does_not_slow_down_is_not_throttling(tmp_path: Path, changed: dict[str, str]) -> None:
    reader = HealthReader(write(tmp_path, ORIN_NX))
    write(tmp_path, changed)
    assert reader.read().throttled is False


def test_a_desktop_tells_its_sensors_and_counts_throttling_since_the_last_look(tmp_path: Path) -> None:
    reader = HealthReader(write(tmp_path, DESKTOP))
    health = reader.read()
    assert [(t.sensor, t.celsius, t.limit) for t in health.temperatures] == [
        ("x86_pkg_temp", 47.0, None),
        ("coretemp Package id 0", 48.0, 84.0),
    ]
    assert (health.throttled, health.cpu_frequency_share) == (False, None)
    assert "no frequency: the processors have no cpufreq" in health.absent
    write(tmp_path, {f"{CPU}/cpu0/thermal_throttle/package_throttle_count": "45\n"})
    assert reader.read().throttling == ("thermal throttling of a package: 5 more",)
    assert reader.read().throttled is False


def test_a_machine_that_tells_nothing_is_told_as_such(tmp_path: Path) -> None:
    health = HealthReader(tmp_path).read()
    assert (health.temperatures, health.throttled, health.memory_available_bytes) == ((), None, None)
    assert (health.load_1min, health.steal_share, health.cpu_pressure, health.processors) == (None, None, None, None)
    assert [text.split(":")[0] for text in health.absent] == [
        "no temperature",
        "no throttling",
        "no free memory",
        "no frequency",
        "no load",
        "no pressure",
    ]
    assert health.hottest is None
    assert set(health.figures().values()) == {"", "; ".join(health.absent)}


def test_steal_and_pressure_are_those_since_the_last_look(tmp_path: Path) -> None:
    reader = HealthReader(write(tmp_path, PROC))
    assert reader.read().cpu_pressure == pytest.approx(0.05), "the kernel's own mean where no time is given"
    write(tmp_path, {"proc/stat": STAT.format(steal=25).replace("cpu  100", "cpu  175")})
    write(tmp_path, {"proc/pressure/cpu": PRESSURE.format(avg=9.0, total=1_500_000)})
    health = reader.read(2.0)
    assert health.steal_share == pytest.approx(0.25)
    assert health.cpu_pressure == pytest.approx(0.25)


def test_free_memory_is_what_the_control_group_grants(tmp_path: Path) -> None:
    root = write(tmp_path, PROC)
    write(root, {"sys/fs/cgroup/memory.max": f"{2**30}\n", "sys/fs/cgroup/memory.current": f"{2**29}\n"})
    assert HealthReader(root).read().memory_available_bytes == 2**29


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    write(tmp_path, {f"{ZONES}0/type": "cv1-thermal\n"})
    os.mkfifo(tmp_path / f"{ZONES}0/temp")  # answers like the file of a zone that is switched off
    assert "cv1-thermal" in HealthReader(tmp_path).read().absent[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted({**ORIN_NX, **DESKTOP})), st.binary(max_size=40)))
def test_damaged_files_are_never_an_error(tmp_path: Path, damaged: dict[str, bytes]) -> None:
    root = write(tmp_path, {**ORIN_NX, **DESKTOP})
    reader = HealthReader(root)
    for name, data in damaged.items():
        (root / name).write_bytes(data)
    health = reader.read(1.0)
    assert all(-40.0 <= t.celsius <= 150.0 for t in health.temperatures)
    assert health.steal_share is None or 0.0 <= health.steal_share <= 1.0
    assert health.figures()


class Nvml(types.SimpleNamespace):
    """NVML of a computer with one GPU; ``fails`` are functions this GPU has no answer to."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    fails: tuple[str, ...] = ()
    bits = 0
    closed = 0
    reasons = "nvmlDeviceGetCurrentClocksThrottleReasons"

    def __getattr__(self, name: str):
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: setattr(self, "closed", self.closed + 1),
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda _: b"NVIDIA GeForce RTX 4090",
            "nvmlDeviceGetTemperature": lambda *_: 71,
            "nvmlDeviceGetTemperatureThreshold": lambda *_: 98,
            self.reasons: lambda _: self.bits,
            "nvmlDeviceGetMemoryInfo": lambda _: types.SimpleNamespace(free=5 * 2**30),
        }

        def call(*arguments: object) -> object:
            if name in self.fails:
                raise self.NVMLError("Not Supported")
            return answers[name](*arguments)

        if name not in answers:
            raise AttributeError(name)
        return call


def test_nvml_tells_temperature_throttling_and_free_memory(tmp_path: Path) -> None:
    nvml = Nvml(bits=0x41)  # idle, and slowed down by heat
    probe = NvmlProbe(nvml)
    health = HealthReader(write(tmp_path, DESKTOP), probe).read()
    expected = GpuHealth("NVIDIA GeForce RTX 4090", 71.0, 98.0, ("hardware thermal slowdown",), 5 * 2**30)
    assert health.gpus == (expected,)
    assert health.throttling == ("NVIDIA GeForce RTX 4090: hardware thermal slowdown",)
    assert health.hottest is not None and (health.hottest.celsius, health.hottest.limit) == (71.0, 98.0)
    assert health.figures()["gpu_memory_free_mb"] == "5120"
    probe.close()
    probe.close()
    assert nvml.closed == 1


@pytest.mark.parametrize("name", ["nvmlDeviceGetCurrentClocksEventReasons", "neither"])
def test_throttling_is_told_under_the_newer_name_and_unknown_without_one(name: str) -> None:
    ((gpu,), _) = NvmlProbe(Nvml(bits=0x04, reasons=name))()
    assert gpu.throttling == (None if name == "neither" else ("software power cap",))


def test_what_a_gpu_does_not_answer_is_unknown() -> None:
    fails = (
        "nvmlDeviceGetTemperatureThreshold",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetMemoryInfo",
    )
    ((gpu,), notes) = NvmlProbe(Nvml(fails=fails))()
    assert (gpu.temperature_c, gpu.limit_c, gpu.throttling, gpu.memory_available_bytes) == (71.0, None, None, None)
    assert notes == ()


def test_a_driver_without_nvml_is_told(tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version")
    assert NvmlProbe(Nvml(fails=("nvmlInit",)), driver)()[1] == (
        "no figures of the GPU: NVML does not start (Not Supported)",
    )
    assert NvmlProbe(Nvml(fails=("nvmlInit",)), tmp_path / "none")() == ((), ())
    assert NvmlProbe(Nvml(fails=("nvmlDeviceGetCount",)), driver)()[1] == (
        "no figures of the GPU: NVML failed (Not Supported)",
    )
