"""The look-up table of the device that is searched for: found, and refused where it is not what its name says."""

from __future__ import annotations

import sys
from pathlib import Path

from dcqfa_ros.devices.detect import detect
from training.config import TrainConfig
from training.lut import LookUpTable, TableError, load_table
from training.profile_tables import checked_runtime, runtime_of, tables_measured_here
from training.tables_at_hand import DeviceError, device_table

HERE = "here"


def search_table(device: str, config: TrainConfig) -> tuple[Path, LookUpTable]:
    """The table that ``--device`` means: a file, the beginning of a name, or ``here`` for one measured on this machine.

    A table measured elsewhere may be searched; that is said on standard error.

    Raises:
        DeviceError: no such table, or ``here`` and none or several of the tables at hand were measured on this machine;
            the message lists them.
        TableError: the table cannot be read, is that of another device than its file's name says, or was measured
            on this machine with a runtime that is missing now, or with other versions or another driver.
    """
    machine = detect()
    fingerprint = machine.fingerprint
    file = _table_of_this_machine(config, fingerprint) if device == HERE else device_table(device, config)
    table = load_table(file)
    if not (table.name.startswith(file.stem) or file.stem.startswith(table.name)) and not Path(device).is_file():
        raise TableError(
            f"{file}: is the table of {table.name} ({table.device.name}), not of {file.stem}; restore the file, or "
            f"give --device {file} to search for {table.name}"
        )
    if not table.modelled:
        if table.device.fingerprint == fingerprint:
            checked_runtime(table, machine, label=str(file))
        else:
            print(
                f"{file}: measured on another machine than this one ({table.device.fingerprint}); the networks are for "
                f"that machine",
                file=sys.stderr,
            )
    return file, table


def _table_of_this_machine(config: TrainConfig, fingerprint: str) -> Path:
    here, others = tables_measured_here(config, fingerprint)
    if len(here) == 1:
        return here[0][0]
    if here:
        names = ", ".join(f"{path.stem} ({runtime_of(table)}, threads: {table.threads})" for path, table in here)
        raise DeviceError(f"--device {HERE}: {len(here)} tables were measured on this machine: {names}; name one")
    names = ", ".join(f"{p.stem} ({'modelled, ' if t.modelled else ''}{t.device.name})" for p, t in others)
    raise DeviceError(
        f"--device {HERE}: no table was measured on this machine ({fingerprint}); at hand: {names or 'none'}. Make one "
        "with `dcqfa profile` and give its file"
    )
