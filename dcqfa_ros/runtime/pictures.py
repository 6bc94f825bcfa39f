"""Pictures on their way into a policy: resized and cropped as the bundle says, written once, into the worker's memory.

A picture stays in the bytes of the message it came in (:func:`dcqfa_ros.ros.images.decode_image` copies nothing) until
a chunk needs it; :meth:`PictureForm.write` then resizes and crops it straight into the memory that the engine's worker
reads. Pictures that no chunk needs are never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import DepthObservation, ImageObservation
from dcqfa_ros.runtime.errors import PolicyError


class PictureHistory:
    """Pictures of one key as they came, oldest first; not copied yet.

    Attributes:
        frames: ``history`` arrays of the bundle's ``shape``, read-only views of received messages.
    """

    __slots__ = ("frames",)

    def __init__(self, frames: list[NDArray[Any]]) -> None:
        """See the attributes."""
        self.frames = tuple(frames)


class PictureForm:
    """How one image or depth key is brought to the network's size: resize first, then a crop in the middle.

    Images are averaged over the area of a pixel (OpenCV's ``INTER_AREA``); depth takes the nearest pixel, because an
    average over an edge is the depth of nothing.

    Attributes:
        source: the camera's shape, (height, width, 3) or (height, width): the bundle's ``shape``.
        shape: the network's, likewise.
        dtype: uint8 (image) or uint16 (depth).
    """

    def __init__(self, name: str, spec: ImageObservation | DepthObservation) -> None:
        """Read the form of key ``name``.

        Raises:
            PolicyError: shape, dtype, resize and crop of the key contradict each other, or OpenCV is missing.
        """
        is_image = isinstance(spec, ImageObservation)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if is_image else np.uint16)
        wanted = "(height, width, 3) and dtype uint8" if is_image else "(height, width) and dtype uint16"
        channels = spec.shape[2:]
        if len(spec.shape) < 2 or channels != ((3,) if is_image else ()) or spec.dtype != self.dtype.name:
            raise PolicyError(
                f"observation {name!r}: {spec.type} expects shape {wanted}, got {spec.shape} {spec.dtype}"
            )
        self.source = spec.shape
        size = spec.resize or spec.shape[:2]
        crop = spec.crop or size
        if any(part > whole for part, whole in zip(crop, size, strict=True)):
            raise PolicyError(f"observation {name!r}: crop {crop} is larger than the picture, {tuple(size)}")
        self.shape: tuple[int, ...] = (*crop, *channels)
        top, left = ((whole - part) // 2 for whole, part in zip(size, crop, strict=True))
        self._window = slice(top, top + crop[0]), slice(left, left + crop[1])
        self._resized: NDArray[Any] | None = None
        if tuple(size) != tuple(spec.shape[:2]):
            self._resized = np.empty((*size, *channels), self.dtype)
            self._resize = _resizer(name, is_image)

    def write(self, picture: NDArray[Any], out: NDArray[Any]) -> None:
        """Write a picture of shape ``source`` into ``out``, of ``shape``."""
        if self._resized is None:
            np.copyto(out, picture[self._window])
        else:
            self._resize(picture, self._resized)
            np.copyto(out, self._resized[self._window])


def _resizer(name: str, is_image: bool) -> Callable[[NDArray[Any], NDArray[Any]], None]:
    try:
        import cv2  # here, before the first chunk: only bundles that resize need it
    except ImportError as error:
        raise PolicyError(f"observation {name!r} is resized, which needs OpenCV: pip install opencv-python") from error
    how = cv2.INTER_AREA if is_image else cv2.INTER_NEAREST

    def resize(picture: NDArray[Any], out: NDArray[Any]) -> None:
        cv2.resize(picture, (out.shape[1], out.shape[0]), dst=out, interpolation=how)

    return resize
