"""Finding a RealSense camera and setting it up: which device, which profiles, which sensor options; refusals by name.

All of it works on any librealsense device: hardware, a recording, or a software device.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from dcqfa_ros.drivers.protocols import CameraExtrinsics, CameraIntrinsics, DriverError
from dcqfa_ros.drivers.realsense_options import AUTOMATIC, RealSenseOptions

_NEAR = 6
"""So many of the offered profiles are named in a refusal."""


def librealsense() -> Any:
    """Import and return ``pyrealsense2``.

    Raises:
        DriverError: it is not installed, or the system library it needs is not.
    """
    try:
        return importlib.import_module("pyrealsense2")
    except ImportError as error:
        raise DriverError(
            f"RealSense: pyrealsense2 cannot be loaded ({error}): pip install -r requirements/cell.txt, and install "
            "the system library libusb-1.0-0"
        ) from error


def info(device: Any, name: str) -> str:
    """Return a device's text ``name`` of ``rs.camera_info``, empty where it has none."""
    key = getattr(librealsense().camera_info, name)
    return str(device.get_info(key)) if device.supports(key) else ""


def label(device: Any) -> str:
    """Return name and serial number for messages."""
    return f"{info(device, 'name') or 'RealSense'} {info(device, 'serial_number') or '(no serial number)'}"


def choose_device(devices: Sequence[Any], serial_number: str, allow_usb2: bool) -> Any:
    """Return the device with ``serial_number``, or the only one where it is empty.

    Raises:
        DriverError: there is none, not that one, more than one to choose from, or it hangs on USB 2.
    """
    if not devices:
        wanted = f" {serial_number}" if serial_number else ""
        raise DriverError(
            f"RealSense camera{wanted}: no camera is connected; check cable and power, and the udev rules "
            "(docs/robot.md)"
        )
    found = ", ".join(label(device) for device in devices)
    if serial_number:
        matching = [device for device in devices if info(device, "serial_number") == serial_number]
        if not matching:
            raise DriverError(f"RealSense camera {serial_number} is not connected; found: {found}")
    else:
        matching = list(devices)
        if len(matching) > 1:
            raise DriverError(f"{len(matching)} RealSense cameras are connected, set serial_number to one of: {found}")
    device = matching[0]
    usb = info(device, "usb_type_descriptor")
    if usb.startswith(("1", "2")) and not allow_usb2:
        raise DriverError(
            f"{label(device)} is on a USB {usb} link, expected USB 3: use a USB 3 port and cable, turn the plug, or "
            "set allow_usb2 and a slower profile"
        )
    return device


def choose_profiles(device: Any, options: RealSenseOptions) -> list[tuple[Any, list[Any]]]:
    """Return the sensors to open with the stream profiles of each: color as rgb8 and, if wanted, depth as z16.

    Raises:
        DriverError: the device does not offer a profile; the message lists the nearest ones.
    """
    rs = librealsense()
    wanted = [("color", rs.stream.color, rs.format.rgb8, (options.width, options.height))]
    if options.depth:
        wanted.append(("depth", rs.stream.depth, rs.format.z16, options.depth_size))
    chosen: list[tuple[Any, list[Any]]] = []
    for name, stream, form, size in wanted:
        sensor, profile = _profile(device, name, stream, form, (*size, options.fps))
        for other, profiles in chosen:  # one sensor that has both streams opens them together
            if _module(other) == _module(sensor):
                profiles.append(profile)
                break
        else:
            chosen.append((sensor, [profile]))
    return chosen


def _module(sensor: Any) -> str:
    return str(sensor.get_info(librealsense().camera_info.name))


def _profile(device: Any, name: str, stream: Any, form: Any, wanted: tuple[int, int, int]) -> tuple[Any, Any]:
    offered: set[tuple[int, int, int]] = set()
    for sensor in device.query_sensors():
        for profile in sensor.get_stream_profiles():
            if profile.stream_type() != stream or profile.format() != form or not profile.is_video_stream_profile():
                continue
            video = profile.as_video_stream_profile()
            size = (video.width(), video.height(), video.fps())
            if size == wanted:
                return sensor, video
            offered.add(size)
    if not offered:
        raise DriverError(f"{label(device)} has no {name} stream ({form})")

    def distance(size: tuple[int, int, int]) -> float:
        return sum(abs(a - b) / b for a, b in zip(size, wanted, strict=True))

    near = ", ".join("{}x{} at {} Hz".format(*size) for size in sorted(offered, key=distance)[:_NEAR])
    raise DriverError("{} does not offer {} at {}x{} and {} Hz; nearest: {}".format(label(device), name, *wanted, near))


def check_and_set_options(sensors: Sequence[Any], device_label: str, options: RealSenseOptions) -> None:
    """Set exposure and gain of the sensors to be opened; every value is checked before the first is set.

    Raises:
        DriverError: a sensor lacks an option or the value is out of its range; names both.
    """
    rs = librealsense()
    work: list[tuple[Any, Any, float]] = []
    manual: set[str] = set()
    for stream, exposure_us, gain in (
        (rs.stream.color, options.exposure_us, options.gain),
        (rs.stream.depth, options.depth_exposure_us, options.depth_gain),
    ):
        sensor = next((s for s in sensors if any(p.stream_type() == stream for p in s.get_stream_profiles())), None)
        if sensor is None:
            continue
        where = f"{device_label}, {_module(sensor)}"
        fixed = [(rs.option.exposure, exposure_us, "exposure"), (rs.option.gain, gain, "gain")]
        fixed = [entry for entry in fixed if entry[1] != AUTOMATIC]
        automatic = rs.option.enable_auto_exposure
        if fixed:
            manual.add(_module(sensor))
        # One module may have both streams: what is fixed for one of them is not automatic for the other.
        if sensor.supports(automatic) and (fixed or _module(sensor) not in manual):
            work.append((sensor, automatic, 0.0 if fixed else 1.0))  # first: a fixed value is ignored under automatic
        for option, value, name in fixed:
            work.append((sensor, option, _checked(sensor, option, value, f"{where}: {name}")))
    for sensor, option, value in work:
        if sensor.get_option(option) != value:
            sensor.set_option(option, value)


def _checked(sensor: Any, option: Any, value: float, what: str) -> float:
    """Return ``value`` in the sensor's own unit and steps."""
    rs = librealsense()
    if not sensor.supports(option):
        raise DriverError(f"{what} cannot be set on this sensor")
    span = sensor.get_option_range(option)
    # Color modules count UVC's 100 us, stereo modules microseconds, and their descriptions say so.
    in_us = option != rs.option.exposure or "usec" in sensor.get_option_description(option).lower()
    scale = 1.0 if in_us else 100.0
    own = value / scale
    if not span.min <= own <= span.max:
        unit = " us" if option == rs.option.exposure else ""
        low, high = span.min * scale, span.max * scale
        raise DriverError(f"{what} is {value:g}{unit}, expected {low:g} to {high:g}{unit}")
    steps = round((own - span.min) / span.step) if span.step > 0 else 0
    return float(span.min + steps * span.step) if span.step > 0 else own


def depth_unit(sensor: Any) -> float:
    """Return the value of one raw depth step, m.

    Raises:
        DriverError: the sensor does not say.
    """
    option = librealsense().option.depth_units
    if sensor.supports(option):
        return float(sensor.get_option(option))
    if sensor.is_depth_sensor():
        return float(sensor.as_depth_sensor().get_depth_scale())
    raise DriverError(f"{_module(sensor)} does not say its depth unit")


def intrinsics(profile: Any) -> CameraIntrinsics:
    """Return the intrinsics of a video stream profile.

    librealsense's Brown-Conrady models (also the inverse one, as realsense-ros does) become ``plumb_bob``,
    Kannala-Brandt becomes ``equidistant``.

    Raises:
        DriverError: the stream has another distortion model.
    """
    rs = librealsense()
    i = profile.as_video_stream_profile().get_intrinsics()
    d = rs.distortion
    if i.model == d.kannala_brandt4:
        model, count = "equidistant", 4
    elif i.model in (d.none, d.brown_conrady, d.modified_brown_conrady, d.inverse_brown_conrady):
        model, count = "plumb_bob", 5
    else:
        raise DriverError(f"distortion model {i.model} is not supported, expected Brown-Conrady or Kannala-Brandt")
    coefficients = tuple(float(c) for c in i.coeffs[:count])
    distortion = coefficients if any(coefficients) else ()
    return CameraIntrinsics(i.width, i.height, i.fx, i.fy, i.ppx, i.ppy, distortion, model)


def extrinsics(depth: Any, color: Any) -> CameraExtrinsics:
    """Return the pose of the depth stream in the color stream's frame."""
    e = depth.get_extrinsics_to(color)
    r = [float(v) for v in e.rotation]  # column by column
    x, y, z = (float(v) for v in e.translation)
    return CameraExtrinsics(tuple(r[3 * column + row] for row in range(3) for column in range(3)), (x, y, z))
