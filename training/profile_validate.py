"""Prediction against measurement: random networks, end to end, on the device of an existing table.

No table is written. The networks are others than those a table was checked on, and every one is a whole chunk of
denoising steps on the robot's engine, timed in turn with a reference network that is known exactly: by how much that
takes longer than predicted, the computer is slower than when the table was measured, and measured latencies are divided
by it. They are reported without that, too. Memory is measured in processes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Generator
from tqdm import tqdm

from dcqfa_ros.devices.detect import Device
from dcqfa_ros.errors import UserError
from training.cost import Cost, cost
from training.lut import LookUpTable
from training.profile_check import random_subnet
from training.profile_networks import Workbench, at_speed_of, groups_of
from training.profile_runtime import ProfiledRuntime
from training.profile_table import UNSTEADY, GroupTimes, reference_spread
from training.profile_timing import time_in_turn
from training.subnet import Subnet

LEAST = 2
_NOT_TIMED = frozenset({"numpy"})
_EARLIER_NAMES = {"onnxruntime cpu": "onnxruntime"}  # what tables called a runtime before all had names


class ValidationError(UserError, ValueError):
    """A table that cannot be validated here; the message names it, what differs and what to do."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One network: predicted and measured costs of a chunk.

    ``measured`` is at the speed that the computer had when the table was measured, as its reference network tells;
    ``present_ms`` is the latency as it is now.
    """

    subnet: Subnet
    executed: str
    predicted: Cost
    measured: Cost
    present_ms: float

    @property
    def latency_error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted.latency_ms / self.measured.latency_ms - 1.0

    @property
    def present_error(self) -> float:
        """(predicted - measured) / measured, at the present speed."""
        return self.predicted.latency_ms / self.present_ms - 1.0

    @property
    def memory_error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted.memory_bytes / self.measured.memory_bytes - 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome of a validation.

    Attributes:
        points: every network.
        speed: milliseconds of the reference networks now, over what the table predicts for them, by executed form: how
            much slower this computer runs than when the table was measured.
        spread: how much the references varied: interquartile range / median.
    """

    points: tuple[Compared, ...]
    speed: Mapping[str, float]
    spread: float

    @property
    def by_form(self) -> dict[str, list[Compared]]:
        """The networks by executed form."""
        forms = dict.fromkeys(point.executed for point in self.points)
        return {form: [point for point in self.points if point.executed == form] for form in forms}

    @property
    def mape(self) -> float:
        """Mean absolute relative error of latency."""
        return _errors(self.points)["mape"]

    @property
    def worst(self) -> float:
        """Greatest absolute relative error of latency."""
        return _errors(self.points)["worst"]

    @property
    def memory_mape(self) -> float:
        """Mean absolute relative error of memory."""
        return _errors(self.points)["memory_mape"]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **_errors(self.points),
            "n": len(self.points),
            "forms": {
                form: {**_errors(part), "n": len(part), "speed": round(self.speed[form], 4)}
                for form, part in self.by_form.items()
            },
            "reference_spread": round(self.spread, 4),
            "busy": self.spread > UNSTEADY,
        }


def check_table(
    table: LookUpTable, device: Device, runtime: ProfiledRuntime | None = None, threads: int | None = None
) -> None:
    """Refuse a table that was not measured on this device, with this runtime, its version and these threads.

    Args:
        table: to compare with.
        device: this computer.
        runtime: that measures; None to leave it out.
        threads: of the runtime; None for those of the table.

    Raises:
        ValidationError: naming what differs.
    """
    again = f"measure one here: dcqfa profile --threads {threads or table.threads} --out FILE"
    if table.modelled:
        raise ValidationError(f"table {table.name}: modelled, not measured; there is nothing to compare with; {again}")
    if table.device.fingerprint != device.fingerprint:
        raise ValidationError(
            f"table {table.name}: measured on another device ({table.device.fingerprint}); this one is "
            f"{device.fingerprint}; {again}"
        )
    if threads is not None and table.threads != threads:
        raise ValidationError(
            f"table {table.name}: measured with {table.threads} threads, asked for {threads}; {again}"
        )
    if runtime is None:
        return
    if runtime_of(table) != runtime.name:
        raise ValidationError(f"table {table.name}: measured on {runtime_of(table)}, not {runtime.name}; {again}")
    for package in (set(table.versions) | set(runtime.versions)) - _NOT_TIMED:
        then, now = table.versions.get(package, "none"), runtime.versions.get(package, "none")
        if then != now:
            raise ValidationError(
                f"table {table.name}: measured with {package} {then}, here is {now}; {again}, or install that version"
            )


def runtime_of(table: LookUpTable) -> str:
    """Name of the runtime that a table was measured on."""
    return _EARLIER_NAMES.get(table.runtime, table.runtime)


def validate(table: LookUpTable, bench: Workbench, count: int, seed: int = 1, quiet: bool = True) -> Report:
    """Compare predicted with measured costs of ``count`` random networks, spread evenly over executed forms.

    Args:
        table: of this device (:func:`check_table`).
        bench: the space, runtime and settings; each network is timed as often as one of a table.
        count: of networks, at least 2.
        seed: of the draw; 0 is that of the networks a table is checked on while it is measured.
        quiet: no progress bar.

    Raises:
        ValidationError: ``count`` is below 2.
        TableError: the table lacks an entry of the space.
        EngineError: the runtime cannot load a network.
        MeasurementError: memory cannot be measured.
    """
    if count < LEAST:
        raise ValidationError(f"--validate: expected at least {LEAST} networks, got {count}")
    shape, settings = bench.space.shape, bench.settings
    precisions = bench.checked()
    generator = Generator().manual_seed(seed)
    drawn = {
        p: [random_subnet(bench.space, p, generator) for _ in range(len(range(i, count, len(precisions))))]
        for i, p in enumerate(precisions)
    }
    predicted = {s: cost(table, shape, s, settings.diffusion.steps) for part in drawn.values() for s in part}
    points: list[Compared] = []
    speed: dict[str, float] = {}
    spreads = []
    with tqdm(total=2 * count, unit="network", disable=quiet, desc=f"validate {table.name}") as bar:
        for precision, subnets in drawn.items():
            executed = bench.runtime.forms[precision].executed
            reference = cost(table, shape, bench.reference(precision), settings.diffusion.steps).latency_ms
            groups = []
            for part in groups_of(subnets):
                times = time_in_turn(bench.subnets(part), settings.rounds, settings.warm_ups)
                groups.append(GroupTimes.of(times))
                bar.update(len(part))
            spreads.append(reference_spread({str(i): group for i, group in enumerate(groups)}))
            speed[executed] = float(np.median([group.median_ms[0] for group in groups])) / reference
            present = [ms for group in groups for ms in group.median_ms[1:]]
            for subnet, now, then in zip(subnets, present, at_speed_of(reference, groups), strict=True):
                measured = Cost(then, float(bench.memory(subnet)))
                points.append(Compared(subnet, executed, predicted[subnet], measured, now))
                bar.update(1)
    return Report(tuple(points), speed, float(np.median(spreads)))


def _errors(points: Sequence[Compared]) -> dict[str, float]:
    names = ("latency", "present", "memory")
    latency, present, memory = (np.abs([getattr(p, f"{name}_error") for p in points]) for name in names)
    return {
        "mape": round(float(latency.mean()), 4),
        "worst": round(float(latency.max()), 4),
        "present_mape": round(float(present.mean()), 4),
        "present_worst": round(float(present.max()), 4),
        "memory_mape": round(float(memory.mean()), 4),
        "memory_worst": round(float(memory.max()), 4),
    }
