"""JPEG beside the raw pictures: encoded on a thread of its own, the newest picture only, while somebody listens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.drivers.opencv_camera import opencv
from dcqfa_ros.ros.images import encode_compressed_image

FORMAT = "rgb8; jpeg compressed bgr8"
"""As ``compressed_image_transport`` writes it: subscribers get rgb8 back."""
_JOIN_S = 1.0


def encode_jpeg(color: NDArray[np.uint8], quality: int) -> bytes:
    """Return (height, width, 3) uint8 RGB as JPEG of ``quality`` 1..100.

    Raises:
        DriverError: OpenCV is not installed.
        ValueError: OpenCV could not encode it.
    """
    cv2 = opencv()
    done, data = cv2.imencode(".jpg", cv2.cvtColor(color, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"picture of shape {color.shape} could not be encoded as JPEG")
    return bytes(data.data)


class JpegStream:
    """Publishes the newest submitted picture; those that come while one is encoded replace each other."""

    def __init__(self, publisher: Any, frame_id: str, quality: int, guard: Callable[..., Callable[..., Any]]) -> None:
        """Start the thread; ``guard`` wraps its body so that what it raises becomes the node's fault."""
        self._publisher, self._frame_id, self._quality = publisher, frame_id, quality
        self._condition = threading.Condition()
        self._waiting: tuple[tuple[int, int], NDArray[np.uint8]] | None = None
        self._halted = False
        self._times: deque[float] = deque(maxlen=120)
        self.pictures = 0
        """Pictures encoded and published."""
        self._thread = threading.Thread(target=guard(self._run), name="jpeg", daemon=True)
        self._thread.start()

    def submit(self, stamp: tuple[int, int], color: NDArray[np.uint8]) -> None:
        """Encode and publish this picture soon, if anybody listens."""
        if self._publisher.get_subscription_count() == 0:
            return
        with self._condition:
            self._waiting = (stamp, color)
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                while self._waiting is None and not self._halted:
                    self._condition.wait()
                if self._halted:
                    return
                assert self._waiting is not None
                (stamp, color), self._waiting = self._waiting, None
            begin = time.monotonic()
            data = encode_jpeg(color, self._quality)
            self._times.append((time.monotonic() - begin) * 1e3)
            self._publisher.publish(encode_compressed_image(stamp, self._frame_id, FORMAT, data))
            self.pictures += 1

    @property
    def median_ms(self) -> float:
        """Median time to encode one picture, ms; NaN before the first."""
        times = list(self._times)
        return float(np.median(times)) if times else float("nan")

    def stop(self) -> None:
        """End the thread; safe to call from it."""
        with self._condition:
            self._halted = True
            self._condition.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
