"""Look-up tables that a training configuration names, found beside the user or in the package, and their costs."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import share_directory
from training.conditions import cheapest_subnet
from training.config import ConfigError, TrainConfig
from training.cost import CostTensors, cost_tensors
from training.lut import TableError, load_table
from training.space import SearchSpace


class DeviceError(UserError, ValueError):
    """A device whose table is not at hand; the message says which are."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTables:
    """The devices of a training configuration, each known by the name of its table's file.

    Attributes:
        files: tables by device, in the order of their names.
        costs: what networks cost, by device.
        sha256s: of each file, by device.
        sha256: of all files together, in that order.
    """

    files: dict[str, Path]
    costs: dict[str, CostTensors]
    sha256s: dict[str, str]
    sha256: str

    def as_in(self, payload: Mapping[str, Any]) -> dict[str, bool | None]:
        """Whether each device's table is the one that a checkpoint was written with.

        None says that it is not known of the single table: the checkpoint keeps one hash of all, which is another one.
        """
        if payload.get("tables_sha256", self.sha256) == self.sha256:
            return dict.fromkeys(self.files, True)
        known = payload.get("table_files")
        if known is None:
            return dict.fromkeys(self.files)
        return {device: known.get(device) == sha256 for device, sha256 in self.sha256s.items()}


def device_tables(config: TrainConfig, space: SearchSpace) -> DeviceTables:
    """Read the tables that a configuration names.

    Raises:
        ConfigError: two files have the same name.
        TableError: a file cannot be read, lacks an entry of the space, or has a network that takes no time.
    """
    found, missing = tables_at_hand(config)
    files: dict[str, Path] = {}
    for path in sorted([*found, *map(Path, missing)], key=lambda path: path.name):
        if path.stem in files:
            raise ConfigError(
                f"training configuration {config.name!r}: supernet.tables: two files are called {path.stem}; a device "
                "is known by the name of its file, so rename one"
            )
        files[path.stem] = path
    digest, costs, sha256s = hashlib.sha256(), {}, {}
    for device, path in files.items():
        costs[device] = _costs(path, space, config.diffusion.steps)
        data = path.read_bytes()
        digest.update(data)
        sha256s[device] = hashlib.sha256(data).hexdigest()
    return DeviceTables(files, costs, sha256s, digest.hexdigest())


def _costs(path: Path, space: SearchSpace, steps: int) -> CostTensors:
    table = load_table(path)
    try:
        table.check(space)
        costs = cost_tensors(table, space, steps)
    except TableError as error:
        raise TableError(f"{path}: {error}") from error
    subnet, least = cheapest_subnet(costs, costs.latency)
    if not least > 0.0:
        raise TableError(
            f"{path}: blocks.step_ms, blocks.kv_ms, fixed.encoder_ms, fixed.step_fixed_ms: {space.name(subnet)} takes "
            f"{least:g} ms per chunk, expected more than 0; measure the table again with `dcqfa profile`"
        )
    return costs


def tables_at_hand(config: TrainConfig) -> tuple[list[Path], list[str]]:
    """Files of the configuration's look-up tables, and the names of those that are not there."""
    found: list[Path] = []
    missing: list[str] = []
    for text in config.supernet.tables if config.supernet is not None else ():
        place = Path(text)
        if not place.is_file():
            place = share_directory() / text
        if place.is_file():
            found.append(place)
        else:
            missing.append(text)
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
