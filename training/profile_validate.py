"""Prediction against measurement: random networks, end to end, on the device of an existing table.

No table is written. The networks are others than those a table was checked on, and every one is a whole chunk of
denoising steps on the robot's engine, timed in turn with a reference network that the table tells exactly: by how
much that takes longer now, the computer is slower than when the table was measured, and measured latencies are divided
by it. They are reported without that, too. Memory is measured in processes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Generator
from tqdm import tqdm

from dcqfa_ros.errors import UserError
from training.cost import Cost, cost
from training.lut import LookUpTable
from training.profile_check import random_subnet
from training.profile_networks import Workbench, at_speed_of, groups_of
from training.profile_table import UNSTEADY, GroupTimes, reference_spread
from training.profile_timing import time_in_turn
from training.subnet import Subnet

LEAST = 2
OTHER_SPEED = 0.1  # a steady reference further from its time for the table is not explained by noise


class ValidationError(UserError, ValueError):
    """A validation that cannot be made; the message names the option and what was expected."""


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
    def present_mape(self) -> float:
        """Mean absolute relative error of latency as it is now."""
        return _errors(self.points)["present_mape"]

    @property
    def present_worst(self) -> float:
        """Greatest absolute relative error of latency as it is now."""
        return _errors(self.points)["present_worst"]

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the errors should not be believed: a reference that holds steady at another speed than the table's.

        Where it varies, the computer is busy, which is told by itself.
        """
        if self.spread > UNSTEADY:
            return ()
        return tuple(
            f"not comparable: {form}: the reference network takes {speed:.3f} times what it took for the table, and "
            f"steadily ({self.spread:.1%}): other clocks, or something else runs all the time; measure the table again"
            for form, speed in self.speed.items()
            if abs(speed - 1.0) > OTHER_SPEED
        )

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
            "notes": list(self.notes),
        }


def validate(table: LookUpTable, bench: Workbench, count: int, seed: int = 1, quiet: bool = True) -> Report:
    """Compare predicted with measured costs of ``count`` random networks, spread evenly over executed forms.

    Args:
        table: of this device (:func:`training.profile_tables.checked_runtime`).
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
            reference = bench.reference_ms(table, precision)
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
