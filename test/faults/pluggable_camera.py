"""camera_node whose emulated camera is unplugged by SIGUSR1 and plugged in by SIGUSR2."""

from __future__ import annotations

import signal
import sys

from dcqfa_ros.nodes import camera_sources
from dcqfa_ros.nodes.camera_node import main
from dcqfa_ros.sim.camera_realsense import EmulatedRealSenseCamera


class PluggableCamera(EmulatedRealSenseCamera):
    """The emulated camera of this process, which obeys signals once it is connected."""

    def connect(self) -> None:
        super().connect()
        signal.signal(signal.SIGUSR1, lambda *_: self.emulated.unplug())
        signal.signal(signal.SIGUSR2, lambda *_: self.emulated.plug())


if __name__ == "__main__":
    camera_sources.EmulatedRealSenseCamera = PluggableCamera
    sys.exit(main())
