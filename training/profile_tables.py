"""Tables of this computer: which of those at hand were measured here, and whether one still holds."""

from __future__ import annotations

from pathlib import Path

from dcqfa_ros.devices.detect import Device
from dcqfa_ros.runtime.errors import EngineError
from training.config import TrainConfig
from training.lut import LookUpTable, TableError, load_table
from training.profile_runtime import ProfiledRuntime, profiled_runtime
from training.tables_at_hand import tables_at_hand

_NOT_TIMED = frozenset({"numpy"})  # in the versions of a table, but without influence on what a runtime takes
_EARLIER_NAMES = {"onnxruntime cpu": "onnxruntime"}  # what tables called a runtime before all had names


def runtime_of(table: LookUpTable) -> str:
    """Name of the runtime that a table was measured on."""
    return _EARLIER_NAMES.get(table.runtime, table.runtime)


def tables_measured_here(
    config: TrainConfig, fingerprint: str
) -> tuple[list[tuple[Path, LookUpTable]], list[tuple[Path, LookUpTable]]]:
    """The configuration's tables at hand: those that were measured on the device with ``fingerprint``, and the others.

    Raises:
        TableError: a table cannot be read.
    """
    here: list[tuple[Path, LookUpTable]] = []
    others: list[tuple[Path, LookUpTable]] = []
    for path in tables_at_hand(config)[0]:
        table = load_table(path)
        (here if not table.modelled and table.device.fingerprint == fingerprint else others).append((path, table))
    return here, others


def check_table(
    table: LookUpTable,
    device: Device,
    runtime: ProfiledRuntime | None = None,
    threads: int | None = None,
    label: str | None = None,
) -> None:
    """Refuse a table that was not measured on this device, with this runtime, its version, driver and these threads.

    Args:
        table: to compare with.
        device: this computer.
        runtime: as it is installed here; None to leave it out.
        threads: of the runtime; None for those of the table.
        label: names the table in errors.

    Raises:
        TableError: naming what differs.
    """
    label, again = label or f"table {table.name}", _again(table, threads)
    if table.modelled:
        raise TableError(f"{label}: modelled, not measured; there is nothing to compare with; {again}")
    if table.device.fingerprint != device.fingerprint:
        raise TableError(
            f"{label}: measured on another device ({table.device.fingerprint}); this one is {device.fingerprint}; "
            f"{again}"
        )
    if threads is not None and table.threads != threads:
        raise TableError(f"{label}: measured with {table.threads} threads, asked for {threads}; {again}")
    if runtime is None:
        return
    if runtime_of(table) != runtime.name:
        raise TableError(f"{label}: measured on {runtime_of(table)}, not {runtime.name}; {again}")
    for package in sorted((set(table.versions) | set(runtime.versions)) - _NOT_TIMED):
        then, now = table.versions.get(package, "none"), runtime.versions.get(package, "none")
        if not _same(then, now):
            raise TableError(
                f"{label}: measured with {package} {then}, installed is {now}; {again}, or install that version"
            )


def checked_runtime(
    table: LookUpTable,
    device: Device,
    runtime: str | None = None,
    threads: int | None = None,
    label: str | None = None,
) -> ProfiledRuntime:
    """The runtime of a table, as it is installed here; whatever makes the table wrong for this computer is refused.

    Args:
        table: measured on this computer.
        device: this computer.
        runtime: what the table should be of; None for whatever it is of.
        threads: of the runtime; None for those of the table.
        label: names the table in errors.

    Raises:
        TableError: as :func:`check_table`, or the runtime is not installed here; naming it and what to install.
    """
    check_table(table, device, threads=threads, label=label)
    label, name = label or f"table {table.name}", runtime_of(table)
    if runtime not in (None, name):
        raise TableError(f"{label}: measured on {name}, not {runtime}; {_again(table, threads, runtime)}")
    try:
        found = profiled_runtime(name, device)
    except EngineError as error:
        raise TableError(f"{label}: measured on this computer with {name}, which cannot run now: {error}") from error
    check_table(table, device, found, threads, label)
    return found


def _again(table: LookUpTable, threads: int | None, runtime: str | None = None) -> str:
    name = runtime or runtime_of(table)
    return f"measure one here: dcqfa profile --runtime {name} --threads {threads or table.threads} --out FILE"


def _same(measured: str, installed: str) -> bool:
    """Whether two versions are one, but for what is told of the build."""
    return measured == installed or measured.startswith((f"{installed}-", f"{installed}+"))
