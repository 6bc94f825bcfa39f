"""The Fast DDS profile by which nodes find each other quickly, for every node that has none of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from dcqfa_ros.paths import find_config

PROFILE_VARIABLE = "FASTRTPS_DEFAULT_PROFILES_FILE"
PROFILE_NAME = "fastdds_nodes.xml"
WORKING_DIRECTORY_PROFILE = "DEFAULT_FASTRTPS_PROFILES.xml"


@contextmanager
def discovery_profile(environment: MutableMapping[str, str] | None = None) -> Iterator[bool]:
    """Name our profile to Fast DDS while the body creates the process' first node; yield whether it was named.

    Fast DDS reads profiles once, when the first participant of the process comes into being. A profile chosen by the
    user or by the node (images), and one in the working directory, are kept; another RMW does not look at the variable.

    Raises:
        ConfigNotFoundError: the package is installed without its configuration.
    """
    env = os.environ if environment is None else environment
    before = env.get(PROFILE_VARIABLE)
    if before or Path(WORKING_DIRECTORY_PROFILE).is_file():
        yield False
        return
    env[PROFILE_VARIABLE] = str(find_config(PROFILE_NAME))
    try:
        yield True
    finally:
        if before is None:
            del env[PROFILE_VARIABLE]
        else:
            env[PROFILE_VARIABLE] = before
