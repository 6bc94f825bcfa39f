"""What to run so that a choice no longer rests on a model: the exact commands for a bundle and a device."""

from __future__ import annotations

import re

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.devices.detect import Device
from dcqfa_ros.errors import ConfigNotFoundError
from dcqfa_ros.paths import find_config

_SUPERNET = "_supernet"


def measure_command(spec: BundleSpec, steps: int, threads: int) -> str:
    """Return the command that measures the variants of a bundle on this computer for the selector."""
    return f"dcqfa bench engine --bundle {spec.name} --steps {steps} --threads {threads} --save"


def profile_command(spec: BundleSpec, device: Device, threads: int) -> str:
    """Return the command that writes a look-up table of this computer, from which variants for it are searched.

    The configuration is that of the supernet that belongs to the bundle's training configuration, where there is one.
    """
    table = re.sub(r"[^a-z0-9]+", "_", device.name.lower()).strip("_") or "device"
    return f"dcqfa profile --config {_configuration(spec)} --threads {threads} --out config/tables/{table}.json"


def _configuration(spec: BundleSpec) -> str:
    given = re.search(r"--config\s+(\S+)", spec.training.command)
    name = given[1].rpartition("/")[2] if given else f"{spec.name}.yaml"
    stem = name.removesuffix(".yaml").removesuffix(_SUPERNET)
    supernet = f"training/{stem}{_SUPERNET}.yaml"
    try:
        find_config(supernet)
    except ConfigNotFoundError:
        return f"config/training/{name}"
    return f"config/{supernet}"
