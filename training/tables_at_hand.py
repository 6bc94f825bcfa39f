"""Look-up tables that a training configuration names, found beside the user or in the package."""

from __future__ import annotations

import sys
from pathlib import Path

from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import share_directory
from training.config import TrainConfig


class DeviceError(UserError, ValueError):
    """A device whose table is not at hand; the message says which are."""


def tables_at_hand(config: TrainConfig) -> tuple[list[Path], list[str]]:
    """Files of the configuration's look-up tables, and the names of those that are not there."""
    found: list[Path] = []
    missing: list[str] = []
    for text in config.supernet.tables if config.supernet is not None else ():
        places = (Path(text), share_directory() / text)
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            missing.append(text)
        else:
            found.append(place)
    return found, missing


def device_table(device: str, config: TrainConfig) -> Path:
    """The table of a device: a file, the name of one of the configuration's tables, or the beginning of such a name.

    Of several names with the same beginning the first counts, in the order of the configuration; that is said on
    standard error.

    Raises:
        DeviceError: neither; the message lists the names.
    """
    if Path(device).is_file():
        return Path(device)
    found, missing = tables_at_hand(config)
    exact = [path for path in found if path.stem == device]
    alike = exact or [path for path in found if device and path.stem.startswith(device)]
    if len(alike) > 1:
        names = ", ".join(path.stem for path in alike)
        print(f"--device {device}: begins {names}; taking {alike[0].stem}", file=sys.stderr)
    if alike:
        return alike[0]
    known = ", ".join(path.stem for path in found) or "none"
    absent = f" (not found: {', '.join(missing)})" if missing else ""
    raise DeviceError(
        f"--device {device}: no table of that device; at hand: {known}{absent}. Give a file, or make one with "
        "`dcqfa profile`"
    )
