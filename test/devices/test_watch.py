"""The watch goes cheaper under load and back when it ends, says why, and never flaps."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcqfa_ros.devices.ladder import Ladder, Rung
from dcqfa_ros.devices.watch import Action, Cause, Decision, Sample, Watch
from dcqfa_ros.devices.watch_limits import WatchError, WatchLimits

MIB = 2**20
FULL = Rung("fp32", "onnxruntime", 16, 40.0, 280 * MIB, 0, 0.91)
EIGHT = Rung("w8a8", "onnxruntime", 16, 18.0, 140 * MIB, 0, 0.89)
FEW = Rung("w8a8", "onnxruntime", 8, 9.0, 140 * MIB, 0, 0.86)
LADDER = Ladder((FULL, EIGHT, FEW), True, {}, 100.0, 10.0)
LIMITS = WatchLimits()
QUICK = WatchLimits(dwell_s=8.0, hold_up_s=5.0, prove_s=20.0, wait_most_s=60.0)


@dataclasses.dataclass
class Switch:
    time_s: float
    decision: Decision


class Simulated:
    """A device on which a chunk takes the rung's cost times the load, and a policy that does what is decided."""

    def __init__(self, ladder: Ladder = LADDER, limits: WatchLimits = LIMITS, performs: bool = True) -> None:
        self.watch = Watch(ladder, limits, performs)
        self.limits, self.performs = limits, performs
        self.present = ladder.rungs[0]
        self.time = 0.0
        self.switches: list[Switch] = []
        self.decisions: list[Decision] = []
        self.refuse: dict[str, str] = {}
        self.facts: dict[str, object] = {}
        self.noise = random.Random(0)
        self.jitter = 0.0

    def step(self, load: float, chunks: int = 2) -> Decision:
        """One second."""
        self.time += 1.0
        took = tuple(self.present.cost * load * (1 + self.noise.uniform(-1, 1) * self.jitter) for _ in range(chunks))
        facts = {"latencies_ms": took, "engine": self.present.engine, "steps": self.present.steps, **self.facts}
        decision = self.watch.feed(Sample(self.time, **facts))
        self.decisions.append(decision)
        if decision.action is not Action.STAY:
            self.switches.append(Switch(self.time, decision))
            assert decision.target is not None
            if decision.target.engine in self.refuse:
                self.watch.refused(decision.target.engine, self.refuse[decision.target.engine])
            elif self.performs:
                self.present = decision.target
        return decision

    def run(self, seconds: int, load: float | Callable[[float], float] = 1.0, chunks: int = 2) -> list[Switch]:
        """Return the switches of this time."""
        before = len(self.switches)
        for _ in range(seconds):
            self.step(load(self.time) if callable(load) else load, chunks)
        return self.switches[before:]


def test_without_load_nothing_changes() -> None:
    world = Simulated()
    assert world.run(300) == []
    assert world.decisions[-1].cause is Cause.NONE
    assert "40% of the budget of 100 ms" in world.decisions[-1].reason


def test_under_load_the_best_rung_that_fits_is_taken_and_the_first_again_afterwards() -> None:
    world = Simulated()
    world.run(20)
    (down,) = world.run(60, 3.0)  # 40 ms take 120, 18 take 54
    assert (down.decision.action, down.decision.target, down.decision.cause) == (Action.CHEAPER, EIGHT, Cause.LATENCY)
    assert "120.0 ms (p95), 120% of the budget" in down.decision.reason
    assert "its recorded score is 0.890" in down.decision.reason
    assert down.decision.figures["slow_down"] == "3.00"
    assert down.time_s <= 20 + LIMITS.hold_down_s + LIMITS.window_s + 1
    (back,) = world.run(60)
    assert (back.decision.action, back.decision.target, back.decision.cause) == (Action.BACK, FULL, Cause.RELIEF)
    assert "would take 40.0 ms now" in back.decision.reason
    assert back.time_s >= 80 + LIMITS.hold_up_s


def test_heavier_load_leads_further_down_at_once() -> None:
    world = Simulated()
    world.run(20)
    (down,) = world.run(60, 6.0)
    assert down.decision.target == FEW


def test_under_the_heaviest_load_the_cheapest_is_taken_and_it_is_said_that_there_is_none_cheaper() -> None:
    world = Simulated()
    world.run(20)
    (down,) = world.run(60, 20.0)
    assert down.decision.target == FEW
    assert world.decisions[-1].cause is Cause.LATENCY
    assert "the cheapest there is" in world.decisions[-1].reason


def test_a_short_burst_changes_nothing() -> None:
    world = Simulated()
    world.run(20)
    world.run(2, 3.0)
    assert world.run(100) == [] and world.switches == []


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 30.0), st.integers(0, 1000), st.floats(0.0, 0.1), st.integers(1, 5))
def test_constant_load_changes_the_rung_at_most_once(load: float, seed: int, jitter: float, chunks: int) -> None:
    world = Simulated(limits=QUICK)
    world.noise.seed(seed)
    world.jitter = jitter
    assert len(world.run(200, load, chunks)) <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.3, 15.0)), min_size=1, max_size=15), st.integers(0, 99))
def test_random_load_changes_the_rung_a_bounded_number_of_times_and_ends_where_it_began(
    phases: list[tuple[int, float]], seed: int
) -> None:
    world = Simulated(limits=QUICK)
    world.noise.seed(seed)
    world.jitter = 0.1
    for seconds, load in phases:
        world.run(seconds, load)
    times = [switch.time_s for switch in world.switches]
    assert all(b - a >= QUICK.dwell_s for a, b in itertools.pairwise(times))
    total = sum(seconds for seconds, _ in phases)
    doublings = math.log2(QUICK.wait_most_s / QUICK.hold_up_s) + 1
    returns = [s for s in world.switches if s.decision.action is Action.BACK]
    rungs = len(LADDER.rungs) - 1
    assert len(returns) <= rungs * (2 * (total / QUICK.prove_s + 1) + doublings + total / QUICK.wait_most_s)
    world.jitter = 0.0
    world.run(int(2 * QUICK.wait_most_s * rungs) + 100)
    assert world.present == FULL, "when the load has ended the first choice runs again"


def test_going_back_that_fails_is_tried_less_and_less_often() -> None:
    world = Simulated()
    # A load that is there whenever the best rung runs: what the table does not know.
    returns = [
        s.time_s
        for _ in range(3000)
        if world.step(4.0 if world.present == FULL else 1.0).action is Action.BACK
        for s in world.switches[-1:]
    ]
    pauses = [b - a for a, b in itertools.pairwise(returns)]
    assert len(returns) >= 4
    assert pauses[1] > 1.3 * pauses[0] and pauses[2] > 1.5 * pauses[1]
    assert len(returns) <= 3000 / LIMITS.wait_most_s + 8
    assert int(world.decisions[-1].figures["failures"]) >= 4


def test_a_success_makes_the_next_wait_shorter_again() -> None:
    world = Simulated()
    for _ in range(400):
        world.step(4.0 if world.present == FULL else 1.0)
    worst = world.watch.wait_s
    world.run(1000)
    assert world.present == FULL and world.watch.wait_s < worst


def test_what_was_refused_is_not_proposed_again_until_there_is_more_memory() -> None:
    world = Simulated()
    world.refuse = {"onnxruntime/w8a8": "out of memory"}
    world.facts["memory_free_bytes"] = 1000 * MIB
    world.run(20)
    (switch,) = world.run(200, 3.0)
    assert switch.decision.target == EIGHT and world.present == FULL
    assert world.watch.refusals == {"onnxruntime/w8a8": "out of memory"}
    assert "refused: onnxruntime/w8a8" in world.decisions[-1].reason
    world.refuse = {}
    world.facts["memory_free_bytes"] = 1200 * MIB
    assert world.run(30, 3.0) == []
    world.facts["memory_free_bytes"] = 1300 * MIB
    assert [s.decision.target for s in world.run(30, 3.0)] == [EIGHT]


def test_what_nobody_carries_out_counts_as_refused_after_a_while() -> None:
    world = Simulated()
    world.run(20)
    decision = next(d for _ in range(60) if (d := world.step(3.0)).action is not Action.STAY)
    world.present = FULL  # the policy did not change
    assert "waiting for onnxruntime/w8a8 with 16 steps" in world.step(3.0).reason
    assert world.run(int(LIMITS.swap_timeout_s) + 50, 3.0) == []
    assert decision.target == EIGHT
    assert "not taken within" in world.watch.refusals["onnxruntime/w8a8"]


def test_a_proposal_is_made_once_stands_and_is_withdrawn() -> None:
    world = Simulated(performs=False)
    world.run(20)
    (proposal,) = world.run(60, 3.0)
    assert proposal.decision.target == EIGHT == world.watch.asked
    world.run(60)
    assert world.watch.asked is None
    assert world.decisions[-1].cause is Cause.NONE
    assert len(world.switches) == 1


def test_steps_change_before_the_engine_does_and_that_is_not_taken_for_a_change_of_its_own() -> None:
    world = Simulated()
    world.run(20)
    next(d for _ in range(60) if (d := world.step(6.0)).action is not Action.STAY)
    world.present = dataclasses.replace(FULL, steps=8, cost=20.0)
    assert "waiting for onnxruntime/w8a8 with 8 steps" in world.step(6.0).reason
    assert world.watch.asked == FEW
    world.present = FEW
    assert world.run(60, 6.0) == []
    assert world.watch.asked is None and world.watch.present == FEW


def test_pinned_steps_leave_only_rungs_with_them() -> None:
    world = Simulated()
    world.facts["steps_pinned"] = True
    world.run(20)
    (down,) = world.run(60, 6.0)
    assert down.decision.target == EIGHT


def test_a_pinned_variant_is_left_alone() -> None:
    world = Simulated()
    world.facts["pinned"] = "variant is pinned to 'fp32'"
    assert world.run(100, 5.0) == []
    assert world.decisions[-1].reason == "variant is pinned to 'fp32'"


def test_little_memory_leads_to_the_best_that_needs_less_and_back_with_room_to_spare() -> None:
    world = Simulated()
    world.facts["memory_free_bytes"] = 100 * MIB
    (down,) = world.run(60)
    assert (down.decision.target, down.decision.cause) == (EIGHT, Cause.MEMORY)
    assert "140 MiB less" in down.decision.reason
    world.facts["memory_free_bytes"] = 300 * MIB  # 140 more would leave 160
    assert world.run(200) == []
    world.facts["memory_free_bytes"] = 500 * MIB
    assert [s.decision.target for s in world.run(200)] == [FULL]


def test_little_memory_of_the_gpu_counts_too() -> None:
    first = dataclasses.replace(FULL, gpu_memory_bytes=900 * MIB)
    world = Simulated(dataclasses.replace(LADDER, rungs=(first, EIGHT)))
    world.facts["gpu_memory_free_bytes"] = 50 * MIB
    (down,) = world.run(60)
    assert "50 MiB of GPU memory" in down.decision.reason


def test_heat_leads_to_a_cheaper_rung_and_only_clear_cooling_back() -> None:
    world = Simulated()
    world.facts |= {"temperature_c": 97.5, "temperature_limit_c": 99.0}
    down = world.run(12)
    assert down == [], "not before the least time between changes"
    (down,) = world.run(15)
    assert (down.decision.cause, down.decision.target) == (Cause.TEMPERATURE, EIGHT)
    assert "97.5 degrees, the limit is 97.0" in down.decision.reason
    world.facts["temperature_c"] = 93.0
    assert world.run(100) == []
    world.facts["temperature_c"] = 91.0
    assert [s.decision.target for s in world.run(100)] == [FULL]


def test_throttling_alone_changes_nothing_but_keeps_from_going_back() -> None:
    world = Simulated()
    world.facts["throttled"] = True
    assert world.run(60) == []
    (down,) = world.run(60, 2.0)  # 80 % of the budget: not too much by itself
    assert (down.decision.cause, down.decision.target) == (Cause.THROTTLING, EIGHT)
    assert world.run(60) == []
    world.facts["throttled"] = False
    assert [s.decision.target for s in world.run(60)] == [FULL]


@pytest.mark.parametrize(("name", "cause"), [("missed", Cause.MISSES), ("starved", Cause.STARVED)])
def test_misses_and_starving_lead_one_rung_down_and_not_further(name: str, cause: Cause) -> None:
    world = Simulated()
    for second in range(200):
        world.facts |= {"ticks": 100 * second, "missed": 0, "starved": 0} | {name: 40 * second}
        world.step(1.0)
    (down,) = world.switches
    assert (down.decision.cause, down.decision.target) == (cause, EIGHT)
    assert "did not end it" in world.decisions[-1].reason


def test_counters_that_begin_anew_are_not_taken_for_misses() -> None:
    world = Simulated()
    for second in range(100):
        since = second % 20
        world.facts |= {"ticks": 100 * since, "missed": 100_000 if second < 20 else 0, "starved": 0}
        world.step(1.0)
    assert world.switches == []


@pytest.mark.parametrize("jump", [-50.0, 3600.0])
def test_a_clock_that_steps_begins_the_observation_anew(jump: float) -> None:
    world = Simulated()
    world.run(17)
    world.run(2, 3.0)
    world.time += jump
    assert "observed anew" in world.step(3.0).reason
    assert world.decisions[-1].action is Action.STAY
    world.run(1, 3.0)
    assert world.switches == []


def test_a_silent_policy_is_said_and_nothing_is_decided() -> None:
    world = Simulated()
    world.run(20)
    world.run(2, 5.0)
    assert world.run(100, 5.0, chunks=0) == []
    assert "has computed no chunk for" in world.decisions[-1].reason
    world.facts["engine"] = ""
    assert "nothing is heard" in world.step(1.0).reason
    world.facts["engine"] = "onnxruntime/other"
    assert "does not hold" in world.step(1.0).reason


def test_slow_policies_are_judged_by_their_few_chunks() -> None:
    world = Simulated(dataclasses.replace(LADDER, budget_ms=100.0))
    for second in range(120):
        world.step(3.0, chunks=1 if second % 4 == 0 else 0)
    assert [s.decision.target for s in world.switches] == [EIGHT]


def test_without_known_latencies_predictions_go_by_the_modelled_ratio() -> None:
    rungs = tuple(dataclasses.replace(r, cost=r.cost / 40.0) for r in LADDER.rungs)
    world = Simulated(dataclasses.replace(LADDER, rungs=rungs, in_ms=False))
    world.run(20, 40.0)
    (down,) = world.run(60, 120.0)
    assert down.decision.target == rungs[1]
    assert down.decision.figures["slow_down"] == ""
    assert [s.decision.target for s in world.run(60, 40.0)] == [rungs[0]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"share_up": 0.9}, "share_up"),
        ({"share_down": float("nan")}, "share_down"),
        ({"memory_ok_bytes": 1}, "memory_ok"),
        ({"prove_s": 1.0}, "prove_s"),
        ({"dwell_s": -1.0}, "dwell_s"),
        ({"window_s": 0.0}, "window_s"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(WatchError, match=words):
        WatchLimits(**values)
