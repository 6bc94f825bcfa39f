"""The distance of another host's clock is known to half a round trip; the arm stops by name where it is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.runtime.clock_skew import PROBES, WINDOW, ClockLimits, ClockWatch
from dcqfa_ros.safety.stops import StopCode

MS = 1_000_000
LIMITS = ClockLimits(skew_ns=20 * MS, silence_ns=2000 * MS)
PERIOD = 200 * MS
EPOCH = 1_700_000_000_000 * MS  # own clock less the monotonic one


class Hosts:
    """Two hosts and the network between them."""

    def __init__(self, ahead_ns: int = 0) -> None:
        self.watch, self.now, self.own, self.ahead = ClockWatch(LIMITS), 0, EPOCH, ahead_ns

    def exchange(self, there_ns: int = MS, back_ns: int = MS) -> None:
        sent = self.own + self.now
        self.watch.probe(sent, self.now)
        echoed = sent + there_ns + self.ahead
        self.watch.echo(sent, echoed, self.now + there_ns + back_ns)
        self.now += PERIOD

    def problem(self) -> StopCode | None:
        problem = self.watch.problem(self.now)
        return problem.code if problem else None


@given(
    st.integers(-(10**12), 10**12),
    st.lists(st.tuples(st.integers(0, 20 * MS), st.integers(0, 20 * MS)), min_size=1, max_size=2 * WINDOW),
)
def test_the_estimate_is_true_to_half_of_the_shortest_round_trip(ahead: int, ways: list[tuple[int, int]]) -> None:
    hosts = Hosts(ahead)
    for there, back in ways:
        hosts.exchange(there, back)
    best = hosts.watch.best
    assert best is not None
    assert abs(best.offset_ns - ahead) <= best.round_trip_ns // 2 + 1
    assert best.round_trip_ns == min(there + back for there, back in ways[-WINDOW:])
    assert hosts.watch.step() is None


def test_unknown_until_an_echo_and_again_after_silence() -> None:
    hosts = Hosts()
    assert hosts.problem() is StopCode.CLOCK_UNKNOWN
    hosts.exchange()
    assert hosts.problem() is None
    hosts.now += LIMITS.silence_ns
    assert hosts.problem() is StopCode.CLOCK_UNKNOWN
    assert "for 2." in hosts.watch.problem(hosts.now).text


def test_a_slow_network_leaves_the_clock_unknown_however_near_it_is() -> None:
    hosts = Hosts()
    hosts.exchange(30 * MS, 30 * MS)
    assert hosts.problem() is StopCode.CLOCK_UNKNOWN
    hosts.exchange(3 * MS, 3 * MS)
    assert hosts.problem() is None


def test_too_large_a_skew_is_named_with_its_size() -> None:
    hosts = Hosts(ahead_ns=-25 * MS)
    hosts.exchange()
    problem = hosts.watch.problem(hosts.now)
    assert problem.code is StopCode.CLOCK_SKEW
    assert "-25.0 ms" in problem.text and "20 ms" in problem.text


def test_a_step_of_either_clock_is_noticed_once() -> None:
    for own, ahead in ((40 * MS, 0), (-40 * MS, 0), (0, 40 * MS), (0, -40 * MS)):
        hosts = Hosts()
        hosts.exchange()
        hosts.exchange()
        assert hosts.watch.step() is None
        hosts.own, hosts.ahead = hosts.own + own, hosts.ahead + ahead - own
        hosts.exchange()
        step = hosts.watch.step()
        assert step is not None and step.code is StopCode.CLOCK_STEP
        assert ("this host's clock" in step.text) == bool(own)
        assert hosts.watch.step() is None
        assert hosts.watch.figures(hosts.now)["clock_steps"] in "12"  # an own step shows in the distance, too


def test_slewing_is_no_step() -> None:
    hosts = Hosts()
    for _ in range(100):
        hosts.own += 500 * PERIOD // 1_000_000  # 500 ppm, the most that NTP slews
        hosts.exchange()
    assert hosts.watch.step() is None


def test_an_unknown_or_repeated_echo_is_left_alone_and_lost_probes_are_forgotten() -> None:
    hosts = Hosts()
    assert hosts.watch.echo(5, 5, 5) is None
    for number in range(3 * PROBES):
        hosts.watch.probe(EPOCH + number, number)
    assert hosts.watch.echo(EPOCH, EPOCH, 10) is None
    assert hosts.watch.echo(EPOCH + 3 * PROBES - 1, EPOCH, 3 * PROBES) is not None
    assert hosts.watch.echo(EPOCH + 3 * PROBES - 1, EPOCH, 3 * PROBES) is None
