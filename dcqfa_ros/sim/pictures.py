"""What simulated cameras can show; needs nothing, so a camera without a cell needs no simulator."""

from __future__ import annotations

MIN_SIZE_PX, MAX_SIZE_PX, MAX_FPS = 16, 8192, 1000.0


def check_size(width: int, height: int) -> None:
    """Check the size of a picture.

    Raises:
        ValueError: a size in px is out of range; it names which.
    """
    for field, size in (("width", width), ("height", height)):
        if not MIN_SIZE_PX <= size <= MAX_SIZE_PX:
            raise ValueError(f"{field}: expected {MIN_SIZE_PX} to {MAX_SIZE_PX} px, got {size}")


def check_pictures(width: int, height: int, fps: float) -> None:
    """Check what a simulated camera is to show.

    Raises:
        ValueError: a size in px or the rate is out of range; it names which.
    """
    check_size(width, height)
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps: expected above 0 and at most {MAX_FPS:g}, got {fps}")
