"""What can be chosen about a RealSense camera, checked before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass

from dcqfa_ros.drivers.protocols import DriverError

AUTOMATIC = -1.0
"""Exposure or gain left to the camera."""


@dataclass(frozen=True, slots=True)
class RealSenseOptions:
    """Profile, exposure and filters of one camera.

    Attributes:
        serial_number: as printed on the camera and by ``rs-enumerate-devices``; empty takes the only camera there is.
        width, height, fps: profile of color and, where it is offered, of depth; px and Hz.
        depth: stream depth too and align it to color.
        depth_width, depth_height: profile of depth where it differs from that of color; 0: the same.
        exposure_us, gain: of color; ``AUTOMATIC`` leaves both to the camera. Microseconds, the camera's own units.
        depth_exposure_us, depth_gain: of the depth sensor, likewise.
        decimation: 1 (none) to 8: the depth picture is reduced by this factor before the other filters.
        spatial, temporal, hole_filling: librealsense's filters of these names, with their default settings.
        allow_usb2: accept a camera on a USB 2 link, which carries only slow profiles.
    """

    serial_number: str = ""
    width: int = 640
    height: int = 480
    fps: int = 30
    depth: bool = True
    depth_width: int = 0
    depth_height: int = 0
    exposure_us: float = AUTOMATIC
    gain: float = AUTOMATIC
    depth_exposure_us: float = AUTOMATIC
    depth_gain: float = AUTOMATIC
    decimation: int = 1
    spatial: bool = False
    temporal: bool = False
    hole_filling: bool = False
    allow_usb2: bool = False

    def __post_init__(self) -> None:
        """Refuse what no camera has.

        Raises:
            DriverError: a value is out of range; names the field.
        """
        for name, low, high in (
            ("width", 1, 8192),
            ("height", 1, 8192),
            ("fps", 1, 1000),
            ("depth_width", 0, 8192),
            ("depth_height", 0, 8192),
            ("decimation", 1, 8),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise DriverError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
        if (self.depth_width == 0) != (self.depth_height == 0):
            raise DriverError(
                f"depth_width, depth_height: expected both or neither, got {self.depth_width} and {self.depth_height}"
            )
        for name in ("exposure_us", "gain", "depth_exposure_us", "depth_gain"):
            value = getattr(self, name)
            if value != AUTOMATIC and not 0 <= value < 1e9:  # refuses NaN too
                raise DriverError(f"{name}: expected 0 or more, or {AUTOMATIC:g} for automatic, got {value!r}")
        for name in ("depth_exposure_us", "depth_gain"):
            if not self.depth and getattr(self, name) != AUTOMATIC:
                raise DriverError(f"{name} is set but depth is off")

    @property
    def depth_size(self) -> tuple[int, int]:
        """Width and height of the depth stream, px."""
        return self.depth_width or self.width, self.depth_height or self.height
