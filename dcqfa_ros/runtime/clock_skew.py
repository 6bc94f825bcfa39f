"""How far the clock of another host lies from this one's, estimated from echoes, and whether a clock was set anew.

A probe leaves at own time ``sent``, the other side answers with its own time, the answer arrives. The round trip is
measured by this host's monotonic clock, which nobody sets; the other clock is ahead by

    offset = echoed - (sent + round_trip / 2),  known to +- round_trip / 2

because the two ways may take different times (as in NTP, RFC 5905 section 8). Of the last samples the one with the
shortest round trip counts. Times are nanoseconds. Nothing is corrected by the estimate: hosts are kept together by
chrony or PTP, and where that has failed the arm stops, by name.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from dcqfa_ros.safety.stops import Stop, StopCode

WINDOW = 16  # samples of which the shortest round trip counts
PROBES = 64  # that may be under way
PEER = "policy_node"


@dataclass(frozen=True, slots=True)
class SkewSample:
    """One echo: how far the other clock is ahead, and the round trip, ns."""

    offset_ns: int
    round_trip_ns: int


@dataclass(frozen=True, slots=True)
class ClockLimits:
    """What clocks may do.

    Attributes:
        skew_ns: largest distance between the two clocks; also how well it must be known.
        silence_ns: time without an echo after which it counts as unknown.
    """

    skew_ns: int
    silence_ns: int

    def __post_init__(self) -> None:
        """Refuse limits that are not positive.

        Raises:
            ValueError: names the limit.
        """
        for name in ("skew_ns", "silence_ns"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number of nanoseconds, got {getattr(self, name)}")


class ClockWatch:
    """Skew to one peer and steps of both clocks. Not thread-safe: it belongs to the executor's thread."""

    def __init__(self, limits: ClockLimits) -> None:
        """Know nothing yet."""
        self.limits = limits
        self.steps = 0
        self._probes: OrderedDict[int, int] = OrderedDict()  # own stamp -> monotonic time
        self._samples: deque[SkewSample] = deque(maxlen=WINDOW)
        self._heard_ns: int | None = None
        self._own_ns: int | None = None  # own clock less the monotonic one
        self._step: Stop | None = None

    def probe(self, own_ns: int, now_ns: int) -> None:
        """Note a probe stamped ``own_ns`` that leaves at monotonic ``now_ns``; notices where the own clock was set."""
        own, before = own_ns - now_ns, self._own_ns
        self._own_ns = own
        if before is not None and abs(own - before) > self.limits.skew_ns:
            self._stepped(f"this host's clock was set {(own - before) / 1e6:+.1f} ms while it was relied on")
            self._probes.clear()
        self._probes[own_ns] = now_ns
        while len(self._probes) > PROBES:
            self._probes.popitem(last=False)

    def echo(self, probe_ns: int, echoed_ns: int, now_ns: int) -> SkewSample | None:
        """Take the answer to the probe stamped ``probe_ns``; None where no such probe is under way."""
        sent_ns = self._probes.pop(probe_ns, None)
        if sent_ns is None:
            return None
        round_trip = now_ns - sent_ns
        sample = SkewSample(echoed_ns - (probe_ns + round_trip // 2), round_trip)
        best = self.best
        self._heard_ns = now_ns
        if best is not None:
            jump = sample.offset_ns - best.offset_ns
            if abs(jump) > self.limits.skew_ns + (sample.round_trip_ns + best.round_trip_ns) // 2:
                self._stepped(f"the clock of {PEER}'s host was set {jump / 1e6:+.1f} ms against this one's")
        self._samples.append(sample)
        return sample

    def _stepped(self, text: str) -> None:
        self.steps += 1
        self._step = Stop(StopCode.CLOCK_STEP, text)
        self._samples.clear()

    @property
    def best(self) -> SkewSample | None:
        """The sample with the shortest round trip of the last ones; None where there is none."""
        return min(self._samples, key=lambda s: s.round_trip_ns, default=None)

    def step(self) -> Stop | None:
        """Return the step of a clock since the last call, if any."""
        step, self._step = self._step, None
        return step

    def problem(self, now_ns: int) -> Stop | None:
        """Return why stamps of the other host cannot be relied on; None where they can."""
        best, heard, limit_ms = self.best, self._heard_ns, self.limits.skew_ns / 1e6
        if best is None or heard is None or now_ns - heard > self.limits.silence_ns:
            since = "yet" if heard is None else f"for {(now_ns - heard) / 1e9:.1f} s"
            text = f"the clock of {PEER}'s host is not known: no echo {since}; is {PEER} of this version active?"
            return Stop(StopCode.CLOCK_UNKNOWN, text)
        if best.round_trip_ns // 2 > self.limits.skew_ns:
            return Stop(
                StopCode.CLOCK_UNKNOWN,
                f"the clock of {PEER}'s host is known to +-{best.round_trip_ns / 2e6:.1f} ms only, expected "
                f"{limit_ms:g} ms: the network is too slow, or a computer too busy",
            )
        if abs(best.offset_ns) > self.limits.skew_ns:
            return Stop(
                StopCode.CLOCK_SKEW,
                f"the clock of {PEER}'s host lies {best.offset_ns / 1e6:+.1f} ms from this one's, its limit is "
                f"{limit_ms:g} ms: synchronise the hosts (chrony, PTP)",
            )
        return None

    def figures(self, now_ns: int) -> dict[str, str]:
        """Skew, how well it is known (half the round trip), when it was heard last, and steps, for diagnostics."""
        best = self.best
        return {
            "clock_skew_ms": f"{best.offset_ns / 1e6:.3f}" if best else "",
            "clock_skew_known_to_ms": f"{best.round_trip_ns / 2e6:.3f}" if best else "",
            "clock_heard_s": f"{(now_ns - self._heard_ns) / 1e9:.2f}" if self._heard_ns is not None else "",
            "clock_steps": str(self.steps),
        }
