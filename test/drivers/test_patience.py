"""A device that comes late is waited for; one that refuses is not."""

from __future__ import annotations

import pytest

from dcqfa_ros.drivers.patience import connect_patiently
from dcqfa_ros.drivers.protocols import DriverError


class AbsentError(DriverError):
    pass


class Device:
    def __init__(self, absent: int, error: DriverError | None = None) -> None:
        self.absent, self.error, self.tries = absent, error or AbsentError("no port"), 0

    def connect(self) -> None:
        self.tries += 1
        if self.tries <= self.absent:
            raise self.error


def test_a_device_that_comes_late_is_waited_for_and_said_once() -> None:
    device, said = Device(absent=2), []
    connect_patiently(device.connect, 30.0, AbsentError, said.append)
    assert device.tries == 3
    assert said == ["no port; waiting for it up to 30 s"]


def test_patience_ends() -> None:
    device = Device(absent=1000)
    with pytest.raises(AbsentError, match="no port"):
        connect_patiently(device.connect, 0.5, AbsentError)
    assert 2 <= device.tries <= 4


def test_without_patience_it_tries_once() -> None:
    device = Device(absent=1)
    with pytest.raises(AbsentError):
        connect_patiently(device.connect, 0.0, AbsentError)
    assert device.tries == 1


def test_a_refusal_is_not_waited_for() -> None:
    device = Device(absent=1000, error=DriverError("another user controls the arm"))
    with pytest.raises(DriverError, match="another user"):
        connect_patiently(device.connect, 30.0, AbsentError)
    assert device.tries == 1
