"""One command source at a time, and a stop when it falls silent."""

from __future__ import annotations

import pytest

from dcqfa_ros.safety.deadman import Deadman
from dcqfa_ros.safety.lease import CommandLease


def test_only_the_holder_is_admitted_and_the_others_are_counted():
    lease = CommandLease(("policy", "teleop"), "policy")
    assert lease.admits("policy")
    assert not lease.admits("teleop") and not lease.admits("stranger")
    assert lease.refused == {"policy": 0, "teleop": 1, "stranger": 1}
    lease.give("teleop")
    assert lease.admits("teleop") and not lease.admits("policy")


def test_an_unknown_holder_is_refused_and_the_old_one_stays():
    lease = CommandLease(("policy",), "policy")
    with pytest.raises(ValueError, match="expected one of policy"):
        lease.give("nobody")
    assert lease.holder == "policy"


def test_the_deadman_expires_only_after_its_timeout_and_only_once_fed():
    deadman = Deadman(0.5)
    assert not deadman.expired(10**12)
    deadman.feed(0)
    assert not deadman.expired(500_000_000)
    assert deadman.expired(500_000_001)
    deadman.feed(500_000_001)
    assert not deadman.expired(1_000_000_000)
    deadman.disable()
    assert not deadman.expired(10**15)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_that_would_never_or_always_expire_is_refused(timeout):
    with pytest.raises(ValueError, match="time-out"):
        Deadman(timeout)
