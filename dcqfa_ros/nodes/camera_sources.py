"""The sources of ``camera_node``: its parameters about the camera, and the driver they describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dcqfa_ros.drivers.extrinsics import CameraPose, load_extrinsics
from dcqfa_ros.drivers.opencv_camera import OpenCVCamera
from dcqfa_ros.drivers.protocols import CameraDriver, CameraIntrinsics, DriverError
from dcqfa_ros.drivers.realsense import RealSenseCamera, RealSenseRecording
from dcqfa_ros.drivers.realsense_options import AUTOMATIC, RealSenseOptions
from dcqfa_ros.drivers.video import VideoCamera
from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.node import ManagedNode
from dcqfa_ros.sim.camera import SimulatedCamera
from dcqfa_ros.sim.camera_realsense import EmulatedRealSenseCamera
from dcqfa_ros.sim.camera_synthetic import SyntheticCamera
from dcqfa_ros.sim.cell_state import cell_state_name

SOURCES = ("simulated", "realsense", "playback", "opencv", "video", "synthetic", "emulated")


def declare_camera(node: ManagedNode) -> None:
    """Declare the parameters that :func:`open_camera` and :func:`camera_pose` read."""

    def add(name: str, default: Any, description: str, **limits: Any) -> None:
        node.add_parameter(name, default, description, read_only=True, **limits)

    add("source", "simulated", f"where pictures come from: {', '.join(SOURCES)}")
    add("width", 640, "px; recordings and videos have their own", minimum=16, maximum=8192)
    add("height", 480, "px; likewise", minimum=16, maximum=8192)
    add("fps", 30.0, "pictures per second; likewise", minimum=1.0, maximum=1000.0)
    add("cell", "", "shared-memory name of the simulated cell; empty: this ROS domain and namespace")
    add(
        "stale_after_ms",
        2000,
        "there is no picture when the cell has not moved on for longer; 0: only when its process is gone",
        minimum=0,
        maximum=600_000,
    )
    add("serial_number", "", "RealSense: as printed on it; empty takes the only one there is")
    add("depth", True, "publish depth aligned to color, where the source has it")
    add("depth_width", 0, "RealSense: px of the depth stream; 0: as color", minimum=0, maximum=8192)
    add("depth_height", 0, "RealSense: likewise", minimum=0, maximum=8192)
    add("allow_usb2", False, "RealSense: accept a USB 2 link, which carries slow profiles only")
    for prefix, what in (("", "color"), ("depth_", "depth")):
        add(f"{prefix}exposure_us", AUTOMATIC, f"RealSense: exposure of {what}, us; -1: automatic", minimum=-1.0)
        add(f"{prefix}gain", AUTOMATIC, f"RealSense: gain of {what}, camera units; -1: automatic", minimum=-1.0)
    add("filters.decimation", 1, "RealSense: depth is reduced by this factor first", minimum=1, maximum=8)
    add("filters.spatial", False, "RealSense: edge-preserving smoothing of depth")
    add("filters.temporal", False, "RealSense: smoothing of depth over time")
    add("filters.hole_filling", False, "RealSense: unknown depth is filled from its neighbours")
    add("device", "0", "opencv: index or path, such as /dev/v4l/by-id/...")
    add("file", "", "playback: recording of librealsense (.db3, .bag); video: any file that OpenCV reads")
    add("at_end", "loop", "playback, video: what follows the last frame", choices=("loop", "end"))
    add("pace", "fps", "video: by the file's frame rate or by its stamps", choices=("fps", "stamps"))
    for name in ("fx", "fy", "cx", "cy"):
        add(f"intrinsics.{name}", 0.0, "opencv, video: from a calibration, px; fx = 0: not calibrated", minimum=0.0)
    add("intrinsics.distortion", [0.0] * 5, "opencv, video: k1, k2, p1, p2, k3 (plumb_bob)")
    add("extrinsics.calibration_file", "", "where the cameras are: a file such as config/camera_extrinsics.yaml")
    add("extrinsics.parent", "", "without a file: frame of the pose below, world or flange; empty: not known")
    add("extrinsics.position", [0.0] * 3, "m, of the color optical frame in the parent")
    add("extrinsics.orientation", [0.0, 0.0, 0.0, 1.0], "unit quaternion x, y, z, w, likewise")


def open_camera(node: ManagedNode, name: str) -> CameraDriver:
    """Return the driver of the node's ``source``, not connected.

    Raises:
        DriverError: the source is unknown, or a parameter does not fit it.
    """
    source = node.parameter("source")
    makers: dict[str, Callable[[ManagedNode], CameraDriver]] = {
        "simulated": _simulated,
        "realsense": lambda n: RealSenseCamera(_options(n)),
        "playback": lambda n: RealSenseRecording(_file(n), n.parameter("at_end"), _options(n)),
        "opencv": _opencv,
        "video": _video,
        "synthetic": lambda n: SyntheticCamera(name, *_profile(n)),
        "emulated": lambda n: EmulatedRealSenseCamera(_options(n)),
    }
    if source not in makers:
        raise DriverError(f"camera {name}: parameter source is {source!r}, expected one of {', '.join(SOURCES)}")
    try:
        return makers[source](node)
    except (DriverError, ValueError) as error:
        raise DriverError(f"camera {name}: {error}") from error


def camera_pose(node: ManagedNode, name: str) -> CameraPose | None:
    """Return where the camera is, from the calibration file or the parameters; None where neither says.

    Raises:
        DriverError: both say, or the pose cannot be used.
        CalibrationError: the file cannot be relied on, or does not hold this camera.
        ConfigNotFoundError: there is no such file.
    """
    file, parent = node.parameter("extrinsics.calibration_file"), node.parameter("extrinsics.parent")
    if file and parent:
        raise DriverError(f"camera {name}: set extrinsics.calibration_file or extrinsics.parent, not both")
    if file:
        return load_extrinsics(find_config(file), [name]).cameras[name]
    if not parent:
        return None
    values = {key: list(node.parameter(f"extrinsics.{key}")) for key in ("position", "orientation")}
    try:
        return CameraPose.model_validate({"parent": parent, "status": "nominal", **values})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DriverError(f"camera {name}: extrinsics.{field}: {first['msg']}, got {first['input']!r}") from error


def _profile(node: ManagedNode) -> tuple[int, int, float]:
    return node.parameter("width"), node.parameter("height"), node.parameter("fps")


def _simulated(node: ManagedNode) -> CameraDriver:
    cell = node.parameter("cell") or cell_state_name(node.context.get_domain_id(), node.get_namespace())
    stale_ms = node.parameter("stale_after_ms")
    return SimulatedCamera(cell, *_profile(node), maximum_age_s=stale_ms / 1e3 if stale_ms else None)


def _options(node: ManagedNode) -> RealSenseOptions:
    fps = node.parameter("fps")
    if fps != round(fps):
        raise DriverError(f"fps is {fps:g}, expected a whole number for a RealSense camera")
    plain = ("serial_number", "width", "height", "depth", "depth_width", "depth_height", "allow_usb2")
    fixed = ("exposure_us", "gain", "depth_exposure_us", "depth_gain")
    filters = ("decimation", "spatial", "temporal", "hole_filling")
    return RealSenseOptions(
        fps=round(fps),
        **{key: node.parameter(key) for key in (*plain, *fixed)},
        **{key: node.parameter(f"filters.{key}") for key in filters},
    )


def _file(node: ManagedNode) -> Path:
    file = node.parameter("file")
    if not file:
        raise DriverError(f"parameter file is empty, source {node.parameter('source')} needs one")
    return Path(file).expanduser()


def _intrinsics(node: ManagedNode, width: int, height: int) -> CameraIntrinsics | None:
    fx, fy, cx, cy = (node.parameter(f"intrinsics.{key}") for key in ("fx", "fy", "cx", "cy"))
    if not fx and not fy:
        return None
    if not (fx and fy):
        raise DriverError(f"intrinsics.fx and .fy: expected both or neither, got {fx:g} and {fy:g}")
    distortion = tuple(node.parameter("intrinsics.distortion"))
    if len(distortion) != 5:
        raise DriverError(f"intrinsics.distortion: expected 5 numbers (k1, k2, p1, p2, k3), got {len(distortion)}")
    return CameraIntrinsics(width, height, fx, fy, cx, cy, distortion if any(distortion) else ())


def _opencv(node: ManagedNode) -> CameraDriver:
    width, height, fps = _profile(node)
    return OpenCVCamera(node.parameter("device"), width, height, fps, _intrinsics(node, width, height))


def _video(node: ManagedNode) -> CameraDriver:
    width, height, _ = _profile(node)
    given = _intrinsics(node, width, height)
    return VideoCamera(_file(node), node.parameter("at_end"), node.parameter("pace"), given)
