"""When a running policy should go to a cheaper rung of its ladder, and when it may go back.

Fed with samples, the watch answers each with a decision, its reason and the figures behind it. It never flaps:

- going cheaper and going back have thresholds of their own, each of which must hold without a break for a while;
- going back is judged by what the better rung would take *now*: its cost times the slow-down of the present one;
- after any change there is none for a minimum time;
- where going back was followed by going cheaper soon after, the next attempt waits twice as long, and so on;
- what was refused is not proposed again until there is clearly more memory or a new ladder.

Times are seconds of one monotonic clock. No thread, no clock and no file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcqfa_ros.devices.ladder import Ladder, Rung
from dcqfa_ros.devices.watch_limits import WatchLimits
from dcqfa_ros.devices.watch_observed import Observed
from dcqfa_ros.devices.watch_types import Action, Cause, Decision, Sample

__all__ = ["Action", "Cause", "Decision", "Sample", "Watch", "WatchLimits"]

_CHEAPER = 0.9  # a rung is cheaper when it costs less than this share
_BY_CHUNKS = frozenset({Cause.LATENCY, Cause.THROTTLING, Cause.STARVED})
_MORE_MEMORY = 1.25  # a refusal is forgotten when this many times the memory is free


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str
    memory_free: int | None


@dataclass(frozen=True, slots=True)
class _Asked:
    target: Rung
    time_s: float
    cause: Cause


class Watch:
    """Decides for one ladder."""

    def __init__(self, ladder: Ladder, limits: WatchLimits, performs: bool = True) -> None:
        """Know nothing yet.

        Args:
            ladder: what the policy may be changed to.
            limits: thresholds and times.
            performs: whether what is decided is carried out, so that it is waited for; else it is a proposal only.
        """
        self.ladder, self.limits, self._performs = ladder, limits, performs
        self._observed = Observed(limits, ladder.budget_ms, ladder.period_ms)
        self._last = Sample(float("-inf"))
        self._present: Rung | None = None
        self._settled: Rung | None = None  # what ran last, leaving out what was on the way to something else
        self._changed_s = float("-inf")  # when the present rung began, or the last proposal was made
        self._heard_s = float("-inf")  # when a latency came last
        self._asked: _Asked | None = None
        self._refused: dict[str, _Refusal] = {}
        self._tried: set[Cause] = set()  # causes that going cheaper did not end
        self._failures = 0
        self._returned_s: float | None = None  # when the policy went back last, until that has proved itself

    # what the owner tells

    def refused(self, engine: str, reason: str) -> None:
        """Take note that ``engine`` could not be opened; it is not proposed again until conditions change."""
        self._refused[engine] = _Refusal(reason, self._last.memory_free_bytes)
        if self._asked is not None and self._asked.target.engine == engine:
            self._asked = None

    @property
    def asked(self) -> Rung | None:
        """What is proposed, or waited for."""
        return None if self._asked is None else self._asked.target

    @property
    def refusals(self) -> Mapping[str, str]:
        """Engines that are not proposed now -> why."""
        return {engine: refusal.reason for engine, refusal in self._refused.items()}

    @property
    def present(self) -> Rung | None:
        """What runs, as far as it is known."""
        return self._present

    @property
    def wait_s(self) -> float:
        """For how long going back must look possible: longer after each attempt that failed."""
        return min(self.limits.hold_up_s * 2.0**self._failures, max(self.limits.wait_most_s, self.limits.hold_up_s))

    def feed(self, sample: Sample) -> Decision:
        """Take a sample and decide."""
        now, before, self._last = sample.time_s, self._last, sample
        self._forget_refusals(sample)
        if not before.time_s <= now <= before.time_s + self.limits.gap_s and before.time_s > float("-inf"):
            self._begin(self._present, now)
            self._heard_s = now
            return self._stay(Cause.BLOCKED, f"no sample for {now - before.time_s:.1f} s: observed anew from here")
        if not sample.engine:
            self._begin(None, now)
            return self._stay(Cause.BLOCKED, "nothing is heard of a running policy")
        rung = self._rung(sample)
        if rung is None:
            self._begin(None, now)
            return self._stay(Cause.BLOCKED, f"{sample.engine} runs, which this device's ranking does not hold")
        if self._present is None or (rung.engine, rung.steps) != (self._present.engine, self._present.steps):
            self._settle(rung, now)
        else:
            self._heard_s = sample.time_s if sample.latencies_ms else self._heard_s
            self._observed.add(sample)
        if self._returned_s is not None and now - self._returned_s >= self.limits.prove_s:
            self._returned_s, self._failures = None, max(0, self._failures - 1)
        return self._decide(sample, rung)

    # bookkeeping

    def _rung(self, sample: Sample) -> Rung | None:
        steps = sample.steps
        if steps is None:  # a policy that does not say is taken to use what it was asked for
            known = next((r for r in (self.asked, self._present) if r and r.engine == sample.engine), None)
            steps = None if known is None else known.steps
        same = [r for r in self.ladder.rungs if r.engine == sample.engine]
        if not same:
            return None
        rung = next((r for r in same if r.steps == steps), same[0])
        if steps is None or rung.steps == steps:
            return rung
        cost = rung.cost * steps / rung.steps  # a number of steps that was set by hand
        return Rung(rung.variant, rung.runtime, steps, cost, rung.memory_bytes, rung.gpu_memory_bytes, None)

    def _begin(self, rung: Rung | None, now: float) -> None:
        self._present = rung
        self._observed.clear()
        if rung is None:
            self._heard_s = now

    def _settle(self, rung: Rung, now: float) -> None:
        """Another rung runs than before: what was measured belongs to the one before."""
        self._begin(rung, now)
        self._heard_s = now
        asked, self._asked = self._asked, None
        if asked is not None and asked.target == rung:
            if asked.cause in (Cause.MISSES, Cause.STARVED):
                self._tried.add(asked.cause)
        elif self._performs and asked is not None:
            self._asked = asked  # on its way there: steps change at once, the engine takes a while
            return
        old, self._settled, self._changed_s = self._settled, rung, now
        self._refused.pop(rung.engine, None)
        if old is None:
            return
        if self._index(rung) < self._index(old):
            self._returned_s = now
        elif self._returned_s is not None:
            self._returned_s = None
            self._failures += self.wait_s < self.limits.wait_most_s

    def _index(self, rung: Rung) -> int:
        found = self.ladder.find(rung.engine, rung.steps)
        return len(self.ladder.rungs) if found is None else found

    def _forget_refusals(self, sample: Sample) -> None:
        free = sample.memory_free_bytes
        for engine, refusal in list(self._refused.items()):
            if free is not None and refusal.memory_free is not None and free >= _MORE_MEMORY * refusal.memory_free:
                del self._refused[engine]

    # the decision

    def _decide(self, sample: Sample, present: Rung) -> Decision:
        now = sample.time_s
        pressing = self._observed.pressing(sample)
        self._tried -= self._observed.ended(pressing)
        back = self._better(sample, present, pressing)
        if sample.pinned:
            self._asked = None
            return self._stay(Cause.BLOCKED, sample.pinned)
        if self._asked is not None:
            target = self._asked.target
            if self._performs and now - self._asked.time_s < self.limits.swap_timeout_s:
                return self._stay(Cause.BLOCKED, f"waiting for {target.label}")
            if self._performs:
                self.refused(target.engine, f"not taken within {self.limits.swap_timeout_s:g} s")
        if now - self._heard_s > self.limits.silent_s:
            return self._stay(Cause.BLOCKED, f"the policy has computed no chunk for {now - self._heard_s:.0f} s")
        rest = self._changed_s + self.limits.dwell_s - now
        if rest > 0.0:
            return self._stay(Cause.BLOCKED, f"no change for another {rest:.0f} s")
        for cause, what in pressing.items():
            # What is known from chunks is known up to the last one only.
            held = self._observed.holds.held(self._heard_s if cause in _BY_CHUNKS else now, cause)
            if held is not None and held >= self.limits.hold_down_s:
                return self._go_cheaper(sample, present, cause, f"{what} for {held:.0f} s")
        if back is not None:
            held = self._observed.holds.held(self._heard_s, (back.engine, back.steps)) or 0.0
            took = self._predicted(back, present)
            reason = (
                f"{back.label} would take {took:.1f} ms now, {self._observed.share(took)}, which held for {held:.0f} s"
            )
            return self._ask(Action.BACK, back, Cause.RELIEF, reason, now)
        return self._nothing_to_do(present, pressing)

    def _go_cheaper(self, sample: Sample, present: Rung, cause: Cause, what: str) -> Decision:
        if cause is Cause.MEMORY:
            return self._save_memory(sample, present, what)
        if cause in self._tried:
            return self._stay(cause, f"{what}: going cheaper did not end it")
        cheaper = [
            r
            for r in self._eligible(sample)
            if r.cost <= _CHEAPER * present.cost and self._fits_memory(r, present, sample, 0)
        ]
        if not cheaper:
            refused = f"; refused: {', '.join(self._refused)}" if self._refused else ""
            return self._stay(cause, f"{what}: {present.label} is the cheapest there is{refused}")
        fit = 0.5 * (self.limits.share_up + self.limits.share_down) * self.ladder.budget_ms
        p95 = self._observed.p95()
        fitting = [r for r in cheaper if p95 is not None and self._predicted(r, present) <= fit]
        target = fitting[0] if fitting else min(cheaper, key=lambda r: r.cost)
        took = "" if p95 is None else f", about {self._predicted(target, present):.1f} ms,"
        costs = f"{target.label} costs {target.cost / present.cost:.0%} of {present.label}{took}"
        return self._ask(Action.CHEAPER, target, cause, f"{what}: {costs}{_quality(target)}", sample.time_s)

    def _save_memory(self, sample: Sample, present: Rung, what: str) -> Decision:
        p95 = self._observed.p95()
        most = self.limits.share_down * self.ladder.budget_ms
        smaller = [
            r
            for r in self._eligible(sample)
            if r.memory_bytes + r.gpu_memory_bytes <= _CHEAPER * (present.memory_bytes + present.gpu_memory_bytes)
            and (p95 is None or r.cost <= present.cost or self._predicted(r, present) <= most)
        ]
        if not smaller:
            return self._stay(Cause.MEMORY, f"{what}: {present.label} needs the least memory there is")
        target = smaller[0]
        saved = present.memory_bytes + present.gpu_memory_bytes - target.memory_bytes - target.gpu_memory_bytes
        reason = f"{what}: {target.label} needs about {saved >> 20} MiB less than {present.label}{_quality(target)}"
        return self._ask(Action.CHEAPER, target, Cause.MEMORY, reason, sample.time_s)

    def _better(self, sample: Sample, present: Rung, pressing: Mapping[Cause, str]) -> Rung | None:
        """Return the best rung that has looked possible for long enough; note since when each has."""
        now, limits = sample.time_s, self.limits
        limit = self._observed.limit(sample)
        cool = (
            sample.temperature_c is None
            or limit is None
            or sample.temperature_c <= limit - limits.temperature_hysteresis_c
        )
        calm = not pressing and not sample.throttled and cool and self._observed.p95() is not None
        eligible, found = self._eligible(sample), None
        for rung in self.ladder.rungs[: self._index(present)]:
            possible = (
                calm
                and rung in eligible
                and self._predicted(rung, present) <= limits.share_up * self.ladder.budget_ms
                and self._fits_memory(rung, present, sample, limits.memory_ok_bytes)
            )
            self._observed.holds.note(now, (rung.engine, rung.steps), possible)
            held = self._observed.holds.held(self._heard_s, (rung.engine, rung.steps))
            if found is None and held is not None and held >= self.wait_s:
                found = rung
        return found

    def _eligible(self, sample: Sample) -> Sequence[Rung]:
        return [
            r
            for r in self.ladder.rungs
            if r.engine not in self._refused and (not sample.steps_pinned or r.steps == sample.steps)
        ]

    def _fits_memory(self, rung: Rung, present: Rung, sample: Sample, reserve: int) -> bool:
        """Tell whether what a rung needs beyond the present one is free, and ``reserve`` beside it."""
        for more, free in (
            (rung.memory_bytes - present.memory_bytes, sample.memory_free_bytes),
            (rung.gpu_memory_bytes - present.gpu_memory_bytes, sample.gpu_memory_free_bytes),
        ):
            if free is not None and more > 0 and free - more < reserve:
                return False
        return True

    def _ask(self, action: Action, target: Rung, cause: Cause, reason: str, now: float) -> Decision:
        if self.asked == target:
            return self._stay(cause, f"proposed: {target.label}; {reason}")
        self._asked = _Asked(target, now, cause)
        if not self._performs:
            self._changed_s = now  # proposals keep the least time between changes, too
        return Decision(action, target, cause, reason, self._figures())

    def _nothing_to_do(self, present: Rung, pressing: Mapping[Cause, str]) -> Decision:
        if pressing:
            cause, what = next(iter(pressing.items()))
            return self._stay(cause, f"{what} not for long yet")
        self._asked = None
        p95 = self._observed.p95()
        if p95 is None:
            return self._stay(Cause.NONE, "too few chunks yet to say how long one takes")
        return self._stay(Cause.NONE, f"{present.label} takes {p95:.1f} ms (p95), {self._observed.share(p95)}")

    # figures

    def _predicted(self, rung: Rung, present: Rung) -> float:
        """Milliseconds that a rung would take now, by the slow-down of the present one against its cost."""
        return (self._observed.p95() or 0.0) * rung.cost / present.cost

    def _stay(self, cause: Cause, reason: str) -> Decision:
        return Decision(Action.STAY, None, cause, reason, self._figures())

    def _figures(self) -> dict[str, str]:
        """What is watched now; empty values are unknown."""
        present, p95 = self._present, self._observed.p95()
        slow = p95 / present.cost if p95 is not None and present and self.ladder.in_ms else None
        return {
            "present": "" if present is None else present.label,
            **self._observed.figures(),
            "slow_down": "" if slow is None else f"{slow:.2f}",
            "failures": str(self._failures),
            "back_in_s": self._back_in(self._last.time_s),
        }

    def _back_in(self, now: float) -> str:
        """Seconds until going back is allowed at the earliest, empty where it is not in sight."""
        present = self._present
        if present is None:
            return ""
        held = [
            h
            for r in self.ladder.rungs[: self._index(present)]
            if (h := self._observed.holds.held(self._heard_s, (r.engine, r.steps))) is not None
        ]
        if not held:
            return ""
        return f"{max(0.0, self.wait_s - max(held), self._changed_s + self.limits.dwell_s - now):.0f}"


def _quality(rung: Rung) -> str:
    return ", its score is not recorded" if rung.score is None else f", its recorded score is {rung.score:.3f}"
