"""Shared memory for images under Fast DDS: which profile a process that publishes images uses, and whether it can work.

Fast DDS' default shared-memory segment (512 KiB) is smaller than one 640x480 RGB image; images then travel as UDP
fragments and mostly get lost. ``config/fastdds_images.xml`` gives the publishing process a segment of 32 MiB. Only the
publisher's segment counts, and every process with the profile reserves its own, so no other node gets it.

A user's own profile and any other RMW are left alone; the result says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcqfa_ros.errors import ConfigNotFoundError
from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.discovery import PROFILE_VARIABLE, WORKING_DIRECTORY_PROFILE

PROFILE_NAME = "fastdds_images.xml"
SEGMENT_BYTES = 32 * 2**20
MESSAGE_BYTES = 4 * 2**20
_HEADROOM_BYTES = 4 * 2**20
"""Beyond the segment: Fast DDS' ports and bookkeeping (2.8 MiB with one subscriber) and other nodes' segments."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives


@dataclass(frozen=True, slots=True)
class ImageTransport:
    """How this process will publish images.

    Attributes:
        profile: ``dcqfa`` (ours), ``user`` (the user's own file is kept) or ``none``.
        rmw: the RMW implementation asked for, ``default`` where the environment names none.
        environment: variables to set before the first node of the process is created; empty unless ``profile`` is ours.
        shared_memory_free: bytes free in /dev/shm, None where it does not exist.
        message: one sentence for the log and diagnostics.
        problem: why images may not arrive and what to do, or None.
    """

    profile: Literal["dcqfa", "user", "none"]
    rmw: str
    environment: Mapping[str, str]
    shared_memory_free: int | None
    message: str
    problem: str | None = None


def shared_memory_free(folder: Path = SHARED_MEMORY) -> int | None:
    """Return the bytes free in ``folder``, or None where it is not there (then Fast DDS has no shared memory)."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def image_transport(
    environment: Mapping[str, str] | None = None,
    *,
    folder: Path = SHARED_MEMORY,
    working_directory: Path | None = None,
    profile: Path | None = None,
) -> ImageTransport:
    """Decide which transport a process started with ``environment`` has for images; changes nothing.

    Args:
        environment: defaults to this process' own.
        folder: where POSIX shared memory lives.
        working_directory: where the process starts; defaults to the current one.
        profile: our profile; defaults to the installed ``config/fastdds_images.xml``.
    """
    environment = os.environ if environment is None else environment
    rmw = environment.get("RMW_IMPLEMENTATION", "") or "default"
    free = shared_memory_free(folder)
    if rmw != "default" and not rmw.startswith("rmw_fastrtps"):
        return ImageTransport(
            "none", rmw, {}, free, f"RMW_IMPLEMENTATION={rmw}: its own configuration is kept, set it up for images"
        )
    try:
        ours = profile or find_config(PROFILE_NAME)
    except ConfigNotFoundError as error:
        return ImageTransport("none", rmw, {}, free, "no Fast DDS profile for images", str(error))
    chosen = environment.get(PROFILE_VARIABLE, "")
    if chosen and Path(chosen).resolve() != ours.resolve():
        return ImageTransport(
            "user",
            rmw,
            {},
            free,
            f"{PROFILE_VARIABLE}={chosen} is kept; its shared-memory segment must hold several images "
            f"(ours is {SEGMENT_BYTES >> 20} MiB)",
            None if Path(chosen).is_file() else f"{PROFILE_VARIABLE}={chosen} does not exist: correct or unset it",
        )
    own = (working_directory or Path.cwd()) / WORKING_DIRECTORY_PROFILE
    if not chosen and own.is_file():
        return ImageTransport(
            "user", rmw, {}, free, f"{own} is kept; its shared-memory segment must hold several images"
        )
    needed = SEGMENT_BYTES + _HEADROOM_BYTES
    if free is None or free < needed:
        have = "does not exist" if free is None else f"has {free >> 20} MiB free"
        return ImageTransport(
            "none",
            rmw,
            {},
            free,
            f"no shared memory for images: {folder} {have}",
            f"{folder} {have}, expected at least {needed >> 20} MiB for each camera: most images will be lost. Enlarge "
            "it (docker run --shm-size=1g or --ipc=host; mount -o remount,size=1g /dev/shm)",
        )
    return ImageTransport(
        "dcqfa",
        rmw,
        {PROFILE_VARIABLE: str(ours)},
        free,
        f"Fast DDS profile {ours.name}: {SEGMENT_BYTES >> 20} MiB of shared memory, {free >> 20} MiB were free",
    )


def use_image_profile(
    environment: MutableMapping[str, str] | None = None, *, folder: Path = SHARED_MEMORY
) -> ImageTransport:
    """Apply :func:`image_transport` to this process. Call it before the process' first node is created.

    Fast DDS reads the variable when the first participant comes into being; later calls have no effect on it. Where the
    profile cannot work the variable is taken back if it names our file: Fast DDS then runs on its defaults without
    an error of its own.
    """
    environment = os.environ if environment is None else environment
    transport = image_transport(environment, folder=folder)
    environment.update(transport.environment)
    if transport.profile == "none" and transport.problem is not None:
        environment.pop(PROFILE_VARIABLE, None)
    return transport
