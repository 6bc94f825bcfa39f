"""Reads a force/torque sensor without pause: hands every fresh reading on at once, and brings a lost sensor back.

No ROS: ``wrench_node`` runs it on a thread of its own, tests and benches on theirs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dcqfa_ros.drivers.ft300s import FT300S
from dcqfa_ros.drivers.ft300s_line import SensorOverrangeError, SensorSilentError
from dcqfa_ros.drivers.protocols import DriverError, WrenchSample

OnSample = Callable[[WrenchSample, str], None]
"""Takes a reading, and why it is no measurement of the load (overrange), else an empty text."""
OnEvent = Callable[[bool, str], None]
"""Takes whether it is good news, and what happened."""

RETRY_S = 0.05
"""Pause between attempts to connect: a sensor that is back must deliver within a second."""
_RESTART_S = 0.25  # a sensor that is silent for longer may have lost its supply and wait for being started


class WrenchReader:
    """The loop of one sensor. ``run`` belongs to one thread; the attributes may be read by any.

    Attributes:
        outage: why there is no reading now; empty while there are.
        overrange: why the newest reading is no measurement; empty where it is.
        overranges: readings beyond the measuring range so far.
        reconnects: times the sensor was connected again after a loss.
        late: readings that were dropped because they were read too late.
    """

    def __init__(
        self,
        driver: FT300S,
        on_sample: OnSample,
        on_event: OnEvent,
        *,
        silence_s: float = 0.1,
        maximum_age_s: float = 0.05,
    ) -> None:
        """Choose the sensor and who hears of it.

        Args:
            driver: the sensor, connected or not.
            on_sample: takes every reading that is not older than ``maximum_age_s``.
            on_event: hears of every loss and return, once each.
            silence_s: without a valid reading for so long the sensor counts as lost.
            maximum_age_s: oldest reading, at the time it was read, that is handed on.
        """
        self._driver = driver
        self._on_sample, self._on_event = on_sample, on_event
        self._silence_s, self._maximum_age_ns = silence_s, int(maximum_age_s * 1e9)
        self.outage = "the sensor has not delivered yet"
        self.overrange = ""
        self.overranges = self.reconnects = self.late = 0
        self._known_lost = False

    def run(self, halt: threading.Event) -> None:
        """Read until ``halt`` is set; every error of the sensor is an outage from which the loop returns."""
        lost_ns: int | None = None
        connected = self._try(self._resume)
        while not halt.is_set():
            if not connected:
                halt.wait(RETRY_S)
                connected = not halt.is_set() and self._try(self._reconnect)
                lost_ns = None
                continue
            try:
                self._deliver(self._driver.read(self._silence_s), "", halt)
                lost_ns = None
            except SensorOverrangeError as error:
                self.overranges += 1
                if not self.overrange:
                    self._on_event(False, str(error))
                self._deliver(error.sample, str(error), halt)
                lost_ns = None
            except SensorSilentError as error:
                self._lose(str(error))
                lost_ns = lost_ns or time.monotonic_ns()
                connected = time.monotonic_ns() - lost_ns < _RESTART_S * 1e9
            except DriverError as error:
                self._lose(str(error))
                connected = False

    def _deliver(self, sample: WrenchSample, overrange: str, halt: threading.Event) -> None:
        if halt.is_set():
            return
        if time.monotonic_ns() - sample.stamp_ns > self._maximum_age_ns:
            self.late += 1
            return
        if self.overrange and not overrange:
            self._on_event(True, f"{self._driver.name}: the load is within the measuring range again")
        self.overrange = overrange
        self._on_sample(sample, overrange)
        self.outage = ""
        if self._known_lost:
            self._known_lost = False
            self._on_event(True, f"{self._driver.name}: delivers again")

    def _lose(self, reason: str) -> None:
        self.outage = reason
        if not self._known_lost:
            self._known_lost = True
            self._on_event(False, f"no wrench: {reason}")

    def _resume(self) -> None:
        self._driver.connect()
        self._driver.discard()  # what came while nobody read is old

    def _reconnect(self) -> None:
        self._driver.close()
        self._driver.connect()
        self.reconnects += 1

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except DriverError as error:
            self._lose(str(error))
            return False
        return True
