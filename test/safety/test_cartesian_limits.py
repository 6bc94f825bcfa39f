"""Whatever commands come, in whatever order: speed, acceleration, jerk and the workspace box hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.safety.cartesian_limits import HARD_MAXIMA, LimitError, MotionLimits, TwistLimiter, Workspace
from dcqfa_ros.safety.limits import NotFiniteActionError

LIMITS = MotionLimits(0.25, 1.0, 10.0, 0.8, 3.0, 30.0)
BOX = Workspace.of([-0.3, 0.2, 0.05], [0.3, 0.6, 0.5])
CENTRE = np.array([0.0, 0.4, 0.3])
FAR = Workspace.of([-3.0, -3.0, -3.0], [3.0, 3.0, 3.0])
ROUNDING = 1e-9


class Plant:
    """An arm that executes velocities exactly, ``delay`` periods late, and the limiter in front of it."""

    def __init__(
        self, box: Workspace = BOX, rate: float = 100.0, delay: int = 0, limits: MotionLimits = LIMITS
    ) -> None:
        self.dt = 1.0 / rate
        self.limits = limits
        self.limiter = TwistLimiter(limits, box, self.dt, latency_s=delay * self.dt)
        self.position = CENTRE.copy()
        self.pending = [np.zeros(3)] * delay
        self.now = 1_000_000_000
        self.twists = [np.zeros(6)]
        self.times = [self.now - round(self.dt * 1e9), self.now]  # ns, of the twists, and of the next
        self.path = [self.position]

    def command(self, twist: object, share: float = 1.0) -> np.ndarray:
        """Send a command, and let ``share`` of a period pass until the next."""
        sent = np.array(self.limiter.bound(twist, self.position, self.now, self.now))
        self.pending.append(sent[:3])
        passed = round(self.dt * share * 1e9)
        self.position = self.position + self.pending.pop(0) * passed / 1e9
        self.now += passed
        self.times.append(self.now)
        self.twists.append(sent)
        self.path.append(self.position)
        return sent

    def check(self) -> None:
        v = np.array(self.twists)
        dt = np.diff(self.times[:-1])[:, None] / 1e9
        a = np.concatenate([np.zeros((1, 6)), np.diff(v, axis=0) / dt])
        j = np.diff(a, axis=0) / dt
        for first, names in (
            (0, ("linear_speed", "linear_acceleration", "linear_jerk")),
            (3, ("angular_speed", "angular_acceleration", "angular_jerk")),
        ):
            for values, name in zip((v, a, j), names, strict=True):
                limit = getattr(self.limits, name)
                assert np.linalg.norm(values[:, first : first + 3], axis=1).max() <= limit * (1 + 1e-6), name
        path = np.array(self.path)
        assert (path >= np.array(self.limiter.workspace.minimum) - ROUNDING).all()
        assert (path <= np.array(self.limiter.workspace.maximum) + ROUNDING).all()
        assert self.limiter.clamped["hard"] == 0


@given(
    st.integers(0, 2**32 - 1), st.sampled_from((60.0, 100.0)), st.integers(0, 5), st.sampled_from((0.2, 1.0, 50.0, 1e9))
)
@settings(max_examples=30, deadline=None)
def test_limits_hold_for_any_sequence_of_commands(seed: int, rate: float, delay: int, size: float) -> None:
    random = np.random.default_rng(seed)
    plant = Plant(rate=rate, delay=delay)
    command = np.zeros(6)
    for _ in range(400):
        if random.random() < random.choice([0.02, 0.2, 1.0]):
            command = random.normal(size=6) * size * random.choice([0.0, 0.1, 1.0])
        plant.command(command)
    plant.check()


@given(st.integers(0, 2**32 - 1), st.sampled_from((0.2, 50.0)))
@settings(max_examples=30, deadline=None)
def test_limits_hold_for_commands_that_come_at_any_time(seed: int, size: float) -> None:
    random = np.random.default_rng(seed)
    plant = Plant()
    command = np.zeros(6)
    for _ in range(600):
        if random.random() < 0.1:
            command = random.normal(size=6) * size
        plant.command(command, share=random.choice([1.0, random.uniform(0.02, 1.0)]))
    plant.check()


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 1.0), st.floats(0.1, 5.0), st.floats(2.0, 200.0))
@settings(max_examples=30, deadline=None)
def test_limits_hold_for_any_limits(seed: int, speed: float, acceleration: float, jerk: float) -> None:
    random = np.random.default_rng(seed)
    plant = Plant(limits=MotionLimits(speed, acceleration, jerk, 0.8, 3.0, 30.0), delay=int(random.integers(3)))
    command = np.zeros(6)
    for _ in range(400):
        if random.random() < 0.05:
            command = random.normal(size=6)
        plant.command(command)
    plant.check()


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_constant_command_ends_at_the_wall_of_the_box(axis: int, sign: float) -> None:
    plant = Plant()
    command = np.zeros(6)
    command[axis] = sign * 10.0
    for _ in range(2000):
        plant.command(command)
    plant.check()
    wall = (BOX.maximum if sign > 0 else BOX.minimum)[axis]
    assert abs(wall - plant.position[axis]) < 0.006
    assert plant.limiter.clamped["workspace"] > 0 and plant.limiter.clamped["linear_speed"] == 2000


def test_outside_the_box_only_the_way_back_is_open() -> None:
    plant = Plant()
    plant.position = np.array([0.35, 0.4, 0.3])
    for _ in range(50):
        plant.command([0.2, 0, 0, 0, 0, 0])
    assert plant.position[0] == pytest.approx(0.35, abs=1e-9)
    for _ in range(200):
        plant.command([-0.2, 0, 0, 0, 0, 0])
    assert plant.position[0] < 0.3


def test_a_command_within_the_limits_is_reached_exactly_and_keeps_its_direction() -> None:
    plant = Plant(FAR)
    wanted = np.array([0.1, -0.05, 0.02, 0.1, 0.2, -0.3])
    for _ in range(60):
        sent = plant.command(wanted)
    assert sent == pytest.approx(wanted, abs=1e-9)
    for _ in range(60):
        sent = plant.command(np.array([3.0, 4.0, 0.0, 0.0, 0.0, 0.0]))
    assert sent[:2] == pytest.approx([0.15, 0.2], abs=1e-3)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_an_arm_that_is_told_to_rest_comes_to_exactly_zero_and_stays_there(seed: int, uneven: bool) -> None:
    rng, plant = np.random.default_rng(seed), Plant(FAR)
    for _ in range(20):
        plant.command(rng.uniform(-0.2, 0.2, 6), share=rng.uniform(0.3, 1.0) if uneven else 1.0)
    for _ in range(120):
        plant.command(np.zeros(6), share=rng.uniform(0.3, 1.0) if uneven else 1.0)
    for _ in range(20):
        assert (plant.command(np.zeros(6)) == 0.0).all()


def test_an_arm_that_is_not_where_it_was_sent_is_held_back_at_the_wall() -> None:
    plant = Plant()
    for _ in range(60):
        plant.command([0.25, 0, 0, 0, 0, 0])
    plant.position = np.array([0.2995, 0.4, 0.3])  # pushed there
    sent = plant.command([0.25, 0, 0, 0, 0, 0])
    assert plant.limiter.clamped["hard"] == 1
    assert plant.position[0] + sent[0] * plant.dt <= BOX.maximum[0]


@given(st.integers(0, 5), st.sampled_from((math.nan, math.inf, -math.inf)))
def test_what_is_not_finite_is_refused_and_changes_nothing(index: int, value: float) -> None:
    plant = Plant()
    for _ in range(20):
        plant.command([0.1, 0, 0, 0, 0, 0.1])
    before = plant.limiter.velocity
    bad = [0.0] * 6
    bad[index] = value
    with pytest.raises(NotFiniteActionError, match="twist"):
        plant.limiter.bound(bad, CENTRE, plant.now, plant.now)
    with pytest.raises(NotFiniteActionError, match="position"):
        plant.limiter.bound([0.0] * 6, [0.0, value, 0.0], plant.now, plant.now)
    with pytest.raises(NotFiniteActionError, match="6 entries"):
        plant.limiter.bound([0.0] * 5, CENTRE, plant.now, plant.now)
    assert plant.limiter.velocity == before


@pytest.mark.parametrize("first", [0.0005, 0.005, 0.01])
def test_an_arm_that_is_held_back_at_the_wall_does_not_bounce(first: float) -> None:
    limiter = TwistLimiter(LIMITS, BOX, 0.01, latency_s=0.06)
    place, now = CENTRE.copy(), 1_000_000_000
    for _ in range(60):
        sent = limiter.bound([0.0, 0.2, 0.0, 0.0, 0.0, 0.0], place, now, now)
        place, now = place + np.array(sent[:3]) * 0.01, now + 10_000_000
    assert sent[1] > 0.1
    place[1] = BOX.maximum[1] - 0.0005  # pushed there: nearer than its commands
    limiter._sent.clear()
    speeds = []
    for step in (first, *[0.01] * 30):
        now += round(step * 1e9)
        speeds.append(limiter.bound([0.0, 0.2, 0.0, 0.0, 0.0, 0.0], place, now, now)[1])
    assert limiter.clamped["hard"] > 0
    assert speeds[0] <= 0.2
    assert min(speeds) > -0.02, "it goes back no faster than its limits let it, and has no reason to"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.05))
def test_speed_limits_hold_even_where_the_arm_jumps(seed: int, jump: float) -> None:
    rng = np.random.default_rng(seed)
    limiter = TwistLimiter(LIMITS, BOX, 0.01, latency_s=0.03)
    place, now, before = CENTRE.copy(), 1_000_000_000, np.zeros(6)
    for _ in range(200):
        twist = rng.normal(scale=[1.0] * 6) * 10.0 ** rng.uniform(-2, 1)
        sent = np.array(limiter.bound(twist, place, now, now))
        step = float(rng.choice([0.001, 0.004, 0.01, 0.01, 0.02]))
        assert np.linalg.norm(sent[:3]) <= LIMITS.linear_speed + ROUNDING
        assert np.linalg.norm(sent[3:]) <= LIMITS.angular_speed + ROUNDING
        for part, most in ((slice(0, 3), LIMITS.linear_acceleration), (slice(3, 6), LIMITS.angular_acceleration)):
            faster = np.abs(sent[part]) > np.abs(before[part])  # what is held back at a wall may stop at once
            assert np.linalg.norm((sent[part] - before[part])[faster]) <= most * 0.01 + ROUNDING
        place, now, before = place + sent[:3] * step, now + round(step * 1e9), sent
        if rng.random() < 0.05:
            place = np.clip(place + rng.normal(scale=jump, size=3), BOX.minimum, BOX.maximum)


@pytest.mark.parametrize("name", list(HARD_MAXIMA))
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, "beyond"])
def test_limits_that_are_absent_or_beyond_the_hard_maximum_are_refused(name: str, value: float | str) -> None:
    given_value = HARD_MAXIMA[name] * 1.01 if value == "beyond" else value
    with pytest.raises(LimitError, match=name):
        MotionLimits(**{**{n: m / 2 for n, m in HARD_MAXIMA.items()}, name: given_value})


@pytest.mark.parametrize(
    ("low", "high"),
    [([], []), ([0.0] * 3, [0.0] * 3), ([0, 0, 0], [1, 1, math.inf]), ([0, 0, 0], [1, 1, 9]), ([1, 0, 0], [0, 1, 1])],
)
def test_a_workspace_without_a_proper_box_is_refused(low: list[float], high: list[float]) -> None:
    with pytest.raises(LimitError, match="workspace"):
        Workspace.of(low, high)
