"""The RealSense driver on librealsense's own software devices and recordings: pairs, depth, loss, refusals by name."""

from __future__ import annotations

import gc
import itertools
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.drivers.protocols import CameraDriver, CameraFrame, DriverError
from dcqfa_ros.drivers.realsense import RealSenseCamera, RealSenseRecording, RecordingEndedError
from dcqfa_ros.drivers.realsense_device import choose_device, librealsense
from dcqfa_ros.drivers.realsense_options import RealSenseOptions
from dcqfa_ros.drivers.realsense_streams import DepthAlignment, Pairing, RawFrame, millimetres
from dcqfa_ros.sim.camera_realsense import EmulatedRealSense
from dcqfa_ros.sim.camera_synthetic import scene

rs = pytest.importorskip("pyrealsense2", reason="pyrealsense2 is not installed: no RealSense driver to test")

TIMEOUT_S = 20.0
SMALL = RealSenseOptions(width=64, height=48)


def small_camera(**options: Any) -> EmulatedRealSense:
    return EmulatedRealSense(**{"width": 64, "height": 48, "serial_number": "123", **options})


@pytest.fixture
def emulated() -> Iterator[EmulatedRealSense]:
    with small_camera() as camera:
        yield camera


def frames_until(camera: CameraDriver, count: int) -> list[CameraFrame]:
    """Read ``count`` frames, whatever interruptions come between them."""
    frames: list[CameraFrame] = []
    end = time.monotonic() + TIMEOUT_S
    while len(frames) < count and time.monotonic() < end:
        try:
            frames.append(camera.read(0.5))
        except RecordingEndedError:
            raise
        except DriverError:
            continue
    assert len(frames) == count
    return frames


def error_of(camera: CameraDriver, frames: list[CameraFrame] | None = None) -> str:
    """Read until the camera refuses (frames on their way still come); return the message."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        try:
            frame = camera.read(3.0)
        except DriverError as error:
            return str(error)
        if frames is not None:
            frames.append(frame)
    return ""


def assert_aligned(depth: np.ndarray | None, expected: np.ndarray) -> None:
    """Without a baseline alignment moves nothing but for rounding, which leaves some pixels to a neighbour or empty."""
    assert depth is not None
    assert (depth == expected).mean() > 0.93
    assert np.isin(depth[depth > 0], expected).all(), "no value that was not measured"


def test_color_and_aligned_depth_come_as_pairs_with_growing_stamps() -> None:
    with small_camera(baseline_m=0.0) as emulated:
        camera: CameraDriver = RealSenseCamera(SMALL, emulated.devices)
        camera.connect()
        assert (camera.has_depth, camera.serial_number, camera.fps) == (True, "123", 30.0)
        frames = frames_until(camera, 8)
        color, depth = scene(64, 48)
        for frame in frames:
            assert frame.depth is not None
            rows = slice(frame.number, frame.number + 48)
            np.testing.assert_array_equal(frame.color, color[rows])
            assert_aligned(frame.depth, depth[rows])
            assert not frame.color.flags.writeable and not frame.depth.flags.writeable
        numbers, stamps = [f.number for f in frames], [f.stamp_ns for f in frames]
        assert numbers == sorted(set(numbers)) and stamps == sorted(set(stamps))
        assert stamps[-1] <= time.monotonic_ns()
        camera.close()
        camera.close()


def test_depth_moves_by_the_baseline_and_intrinsics_are_those_of_the_device(emulated: EmulatedRealSense) -> None:
    camera = RealSenseCamera(SMALL, emulated.devices)
    camera.connect()
    i, e = camera.intrinsics, camera.extrinsics
    assert (i.width, i.height, i.cx, i.cy, i.distortion, i.model) == (64, 48, 31.5, 23.5, (), "plumb_bob")
    assert i.fx == i.fy == pytest.approx(0.96 * 64)
    assert e is not None
    assert e.translation == pytest.approx((0.015, 0.0, 0.0))
    assert e.rotation == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    frame = frames_until(camera, 1)[0]
    assert frame.depth is not None
    raw = scene(64, 48)[1][frame.number : frame.number + 48]
    row, column = 24, 20
    shift = round(0.96 * 64 * 0.015 / (raw[row, column] / 1e3))
    assert frame.depth[row, column + shift] == pytest.approx(raw[row, column], abs=60)
    camera.close()


def test_another_depth_unit_still_gives_millimetres() -> None:
    with small_camera(depth_unit_m=0.0001, baseline_m=0.0) as emulated:
        camera = RealSenseCamera(SMALL, emulated.devices)
        camera.connect()
        frame = frames_until(camera, 1)[0]
        assert_aligned(frame.depth, (scene(64, 48)[1][frame.number : frame.number + 48].astype(int) + 5) // 10)
        camera.close()


def test_filters_keep_the_size_of_color(emulated: EmulatedRealSense) -> None:
    options = RealSenseOptions(width=64, height=48, decimation=2, spatial=True, temporal=True, hole_filling=True)
    camera = RealSenseCamera(options, emulated.devices)
    camera.connect()
    frame = frames_until(camera, 3)[-1]
    assert frame.depth is not None
    assert frame.depth.shape == (48, 64)
    assert 200 < np.median(frame.depth) < 1600
    camera.close()


def test_color_alone_needs_no_depth(emulated: EmulatedRealSense) -> None:
    camera = RealSenseCamera(RealSenseOptions(width=64, height=48, depth=False), emulated.devices)
    camera.connect()
    assert not camera.has_depth
    assert camera.extrinsics is None
    assert frames_until(camera, 2)[0].depth is None
    camera.close()


def test_a_camera_that_is_unplugged_is_named_and_used_again_when_it_is_back(emulated: EmulatedRealSense) -> None:
    camera = RealSenseCamera(SMALL, emulated.devices)
    camera.connect()
    last = frames_until(camera, 2)[-1]
    emulated.unplug()
    assert "Emulated RealSense 123 was disconnected" in error_of(camera)
    with pytest.raises(DriverError, match="no camera is connected"):
        camera.read(0.05)
    other = EmulatedRealSense("999", 64, 48)
    found: list[Any] = [other.make()]
    camera._list = lambda: [*found, *emulated.devices()]
    with pytest.raises(DriverError, match="123 is not connected; found: Emulated RealSense 999"):
        camera.read(0.05)
    emulated.plug()
    again = frames_until(camera, 2)[-1]
    assert again.number > last.number and again.stamp_ns > last.stamp_ns
    assert camera.serial_number == "123"
    camera.close()


def test_a_camera_that_is_there_and_silent_is_opened_anew(
    emulated: EmulatedRealSense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcqfa_ros.drivers.realsense._STALLED_S", 0.5)
    camera = RealSenseCamera(SMALL, emulated.devices)
    camera.connect()
    frames_until(camera, 1)
    device = emulated.devices()[0]
    emulated.unplug()
    camera._list = lambda: [device]  # it answers but sends nothing
    assert "delivered nothing for 0.5 s (it is connected but sends nothing)" in error_of(camera)
    camera._list = emulated.devices
    emulated.plug()
    frames_until(camera, 1)
    camera.close()


def test_a_library_that_fails_while_the_camera_comes_and_goes_is_an_error_by_name_and_no_end(
    emulated: EmulatedRealSense,
) -> None:
    broken = False

    def devices() -> Any:
        if broken:
            raise RuntimeError("failed to set power state")  # as librealsense does while a device enumerates
        return emulated.devices()

    camera = RealSenseCamera(SMALL, devices)
    camera.connect()
    frames_until(camera, 2)
    broken = True
    emulated.unplug()
    assert "has delivered nothing" in error_of(camera), "it cannot be seen to be gone, only that it is silent"
    emulated.plug()
    with pytest.raises(DriverError, match=r"Emulated RealSense 123 cannot be set up: failed to set power state"):
        camera.read(0.05)
    broken = False
    assert len(frames_until(camera, 3)) == 3
    camera.close()


def test_refusals_name_what_is_there_and_what_to_do() -> None:
    with pytest.raises(DriverError, match="no camera is connected; check cable"):
        RealSenseCamera(SMALL, list).connect()
    two = [EmulatedRealSense(serial).make() for serial in ("123", "456")]
    with pytest.raises(DriverError, match=r"789 is not connected; found: Emulated RealSense 123, Emulated RealSense 4"):
        choose_device(two, "789", allow_usb2=False)
    with pytest.raises(DriverError, match=r"2 RealSense cameras.*set serial_number to one of: .*123.*456"):
        choose_device(two, "", allow_usb2=False)
    assert choose_device(two, "456", allow_usb2=False) is two[1]
    slow = EmulatedRealSense("123", usb="2.1").make()
    with pytest.raises(DriverError, match=r"123 is on a USB 2.1 link, expected USB 3"):
        choose_device([slow], "", allow_usb2=False)
    assert choose_device([slow], "", allow_usb2=True) is slow
    with pytest.raises(DriverError, match=r"does not offer color at 800x600 and 30 Hz; nearest: 640x480 at 30 Hz"):
        RealSenseCamera(RealSenseOptions(width=800, height=600), lambda: two[:1]).connect()


def test_a_camera_in_use_is_busy_by_name(emulated: EmulatedRealSense) -> None:
    first, second = (RealSenseCamera(SMALL, emulated.devices) for _ in range(2))
    first.connect()
    with pytest.raises(DriverError, match=r"Emulated RealSense 123 is busy .*end the program that uses it"):
        second.connect()
    frames_until(first, 1)
    first.close()
    second.connect()
    frames_until(second, 1)
    second.close()


def test_exposure_and_gain_are_set_in_the_sensors_own_units_and_turn_automatic_off(emulated: EmulatedRealSense) -> None:
    camera = RealSenseCamera(RealSenseOptions(width=64, height=48, exposure_us=5000.0, gain=16.0), emulated.devices)
    camera.connect()
    stereo, color = emulated.devices()[0].query_sensors()
    assert color.get_option(rs.option.exposure) == 50.0, "color modules count 100 us"
    assert color.get_option(rs.option.gain) == 16.0
    assert color.get_option(rs.option.enable_auto_exposure) == 0.0
    assert stereo.get_option(rs.option.enable_auto_exposure) == 1.0
    camera.close()


def test_an_exposure_out_of_range_is_refused_and_sets_nothing(emulated: EmulatedRealSense) -> None:
    options = RealSenseOptions(width=64, height=48, exposure_us=5000.0, gain=1000.0)
    with pytest.raises(DriverError, match=r"RGB Camera: gain is 1000, expected 0 to 128"):
        RealSenseCamera(options, emulated.devices).connect()
    color = emulated.devices()[0].query_sensors()[1]
    assert (color.get_option(rs.option.exposure), color.get_option(rs.option.enable_auto_exposure)) == (156.0, 1.0)
    with pytest.raises(DriverError, match=r"exposure is 2e\+06 us, expected 100 to 1e\+06 us"):
        RealSenseCamera(RealSenseOptions(width=64, height=48, exposure_us=2e6), emulated.devices).connect()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width"),
        ({"fps": 30.5}, "fps"),
        ({"decimation": 9}, "decimation"),
        ({"depth_width": 640}, "depth_width, depth_height"),
        ({"gain": float("nan")}, "gain"),
        ({"exposure_us": -5.0}, "exposure_us"),
        ({"depth": False, "depth_gain": 5.0}, "depth_gain is set but depth is off"),
    ],
)
def test_senseless_options_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(DriverError, match=words):
        RealSenseOptions(**options)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    with pytest.raises(DriverError, match=r"pip install -r requirements/cell.txt.*libusb-1.0-0"):
        librealsense()


def test_out_of_order_use_is_refused(emulated: EmulatedRealSense) -> None:
    camera = RealSenseCamera(SMALL, emulated.devices)
    with pytest.raises(DriverError, match="not connected"):
        camera.read()
    with pytest.raises(DriverError, match="not connected"):
        _ = camera.intrinsics
    camera.connect()
    with pytest.raises(ValueError, match="timeout_s"):
        camera.read(0.0)
    camera.close()


# Pairing and units


def raw(number: int, time_ms: float, domain: str = "hardware_clock") -> RawFrame:
    return RawFrame(number, time_ms, domain, 0, None)


def test_color_is_paired_with_the_nearest_depth_within_half_a_period() -> None:
    pairing = Pairing(30.0)
    assert pairing.offer("depth", raw(7, 100.0)) is None
    assert pairing.offer("color", raw(1, 130.0)) is None, "too far apart"
    depth = raw(8, 133.0)
    pair = pairing.offer("depth", depth)
    assert pair is not None and (pair[0].number, pair[1]) == (1, depth)
    assert pairing.offer("depth", raw(8, 133.0)) is None
    assert pairing.repeated == 1


def test_streams_of_different_clocks_are_named() -> None:
    pairing = Pairing(30.0)
    assert pairing.trouble() == "no color frame has come"
    pairing.offer("color", raw(1, 1e12, "system_time"))
    assert pairing.trouble() == "no depth frame has come"
    pairing.offer("depth", raw(1, 50.0))
    assert "different clocks (hardware_clock, system_time)" in pairing.trouble()


@given(st.lists(st.tuples(st.sampled_from(["color", "depth"]), st.integers(0, 40)), max_size=120))
def test_no_color_frame_is_ever_used_twice_in_a_row(offers) -> None:
    pairing, used = Pairing(30.0), []
    for kind, number in offers:
        pair = pairing.offer(kind, raw(number, number * 1000 / 30))
        if pair is not None:
            assert pair[1] is not None and abs(pair[0].time_ms - pair[1].time_ms) <= 0.55 * 1000 / 30
            used.append(pair[0])
    assert all(a is not b for a, b in itertools.pairwise(used))


@given(st.integers(1, 20_000), st.integers(0, 65535))
def test_millimetres_are_exact_for_every_unit_of_whole_micrometres(unit_um: int, value: int) -> None:
    table = millimetres(float(np.float32(unit_um * 1e-6)))
    exact = (value * unit_um + 500) // 1000
    assert (value if table is None else table[value]) == (exact if exact <= 65535 else 0)


# Recordings


def record_one_second(recorder: Any) -> None:
    camera = RealSenseCamera(SMALL, lambda: [recorder])
    camera.connect()
    frames_until(camera, 30)
    camera.close()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second of an emulated camera, every frame sent twice, written by librealsense's recorder."""
    path = tmp_path_factory.mktemp("recording") / "camera.db3"
    with small_camera(repeat=2) as emulated:
        recorder = rs.recorder(str(path), emulated.devices()[0])
        record_one_second(recorder)
        del recorder  # which completes the file
    return path


def test_a_recording_plays_each_frame_once_and_ends(recording: Path) -> None:
    camera: CameraDriver = RealSenseRecording(recording, at_end="end")
    camera.connect()
    assert (camera.serial_number, camera.intrinsics.width, camera.has_depth) == ("123", 64, True)
    frames: list[CameraFrame] = []
    color = scene(64, 48)[0]
    began = time.monotonic()
    assert "camera.db3 has ended" in error_of(camera, frames)
    with pytest.raises(RecordingEndedError):
        camera.read()
    numbers = [f.number for f in frames]
    assert numbers == sorted(set(numbers)), "no repetition"
    assert len(numbers) > 20
    assert time.monotonic() - began > 0.8, "at its own pace"
    for frame in frames:
        np.testing.assert_array_equal(frame.color, color[frame.number : frame.number + 48])
        assert frame.depth is not None
    camera.close()
    camera.connect()
    assert camera.read().depth is not None
    camera.close()


def test_a_recording_begins_again_and_numbers_go_on(recording: Path) -> None:
    camera = RealSenseRecording(recording, at_end="loop")
    camera.connect()
    frames = frames_until(camera, 70)
    numbers, stamps = [f.number for f in frames], [f.stamp_ns for f in frames]
    assert numbers == sorted(set(numbers)) and stamps == sorted(set(stamps))
    assert numbers[-1] > 40
    camera.close()


def test_a_recording_can_be_closed_in_the_middle_and_played_without_depth(recording: Path) -> None:
    camera = RealSenseRecording(recording, options=RealSenseOptions(depth=False))
    camera.connect()
    assert camera.read().depth is None
    camera.close()
    with pytest.raises(DriverError, match="not connected"):
        camera.read()


def test_files_that_are_no_recording_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"none\.db3 does not exist"):
        RealSenseRecording(tmp_path / "none.db3").connect()
    for name in ("text.db3", "text.bag"):
        path = tmp_path / name
        path.write_bytes(b"no recording " * 50)
        with pytest.raises(DriverError, match=rf"{name} cannot be read as a librealsense recording"):
            RealSenseRecording(path).connect()


def test_an_alignment_that_is_no_longer_used_is_freed_with_its_pictures() -> None:
    alignment = DepthAlignment(SMALL, 0.001)
    gone = weakref.ref(alignment)
    del alignment
    gc.collect()
    assert gone() is None
