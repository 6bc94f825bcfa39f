"""The look-up table of the device that is searched for: found, and refused where it is not what its name says."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dcqfa_ros.devices.detect import detect
from training.config import TrainConfig
from training.lut import LookUpTable, TableError, load_table
from training.tables_at_hand import DeviceError, device_table, tables_at_hand

HERE = "here"
NOT_TIMED = ("numpy",)  # in the versions of a table, but without influence on what a runtime takes


def search_table(device: str, config: TrainConfig) -> tuple[Path, LookUpTable]:
    """The table that ``--device`` means: a file, the beginning of a name, or ``here`` for one measured on this machine.

    A table measured elsewhere may be searched; that is said on standard error.

    Raises:
        DeviceError: no such table, or ``here`` and none of the tables at hand was measured on this machine.
        TableError: the table cannot be read, is that of another device than its file's name says, or was measured
            on this machine with other versions than are installed now.
    """
    fingerprint = detect().fingerprint
    file = _table_of_this_machine(config, fingerprint) if device == HERE else device_table(device, config)
    table = load_table(file)
    if not (table.name.startswith(file.stem) or file.stem.startswith(table.name)) and not Path(device).is_file():
        raise TableError(
            f"{file}: is the table of {table.name} ({table.device.name}), not of {file.stem}; restore the file, or "
            f"give --device {file} to search for {table.name}"
        )
    if not table.modelled:
        if table.device.fingerprint == fingerprint:
            check_versions(file, table)
        else:
            print(
                f"{file}: measured on another machine than this one ({table.device.fingerprint}); the networks are for "
                f"that machine",
                file=sys.stderr,
            )
    return file, table


def check_versions(file: Path, table: LookUpTable) -> None:
    """Refuse a table of this machine whose runtime was exchanged since.

    Raises:
        TableError: naming both versions.
    """
    for name, measured in table.versions.items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # not a package of its own, or a runtime that this environment lacks
            continue
        if name not in NOT_TIMED and not _same(measured, installed):
            raise TableError(
                f"{file}: measured with {name} {measured}, installed is {installed}; measure it again "
                f"(dcqfa profile --threads {table.threads} --out {file}), or install that version"
            )


def _same(measured: str, installed: str) -> bool:
    """Whether two versions are one, but for what is told of the build."""
    return measured == installed or measured.startswith((f"{installed}-", f"{installed}+"))


def _table_of_this_machine(config: TrainConfig, fingerprint: str) -> Path:
    found, _ = tables_at_hand(config)
    others = []
    for path in found:
        table = load_table(path)
        if not table.modelled and table.device.fingerprint == fingerprint:
            return path
        others.append(f"{path.stem} ({'modelled, ' if table.modelled else ''}{table.device.name})")
    raise DeviceError(
        f"--device {HERE}: no table was measured on this machine ({fingerprint}); at hand: "
        f"{', '.join(others) or 'none'}. Make one with `dcqfa profile` and give its file"
    )
