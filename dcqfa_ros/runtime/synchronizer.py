"""Synchronisation of observation keys into the history a policy reads, without ROS.

A *frame* holds one value per key. One key is the clock: its stamps are those of the frames (the first picture of the
bundle, or its first key where it has none). To each of its stamps S every other key contributes

- a window (a wrench): the last samples stamped S or earlier, the newest of them within the key's tolerance of S, none
  further from the next than a period and the tolerance;
- anything else: the sample whose stamp is nearest to S, within the tolerance, of those that have come. Nothing is
  interpolated: what the policy gets was measured.

A frame is complete once all keys have contributed. The default tolerance is 0.9 of the key's period (1.5 periods for
windows): a sample of the same tick, on its way, is waited for; one between two ticks of a free-running sensor is not.
The newest complete frame is always the one that is used; there is no queue. The policy reads it together with the
frames before it, one step of the policy apart; at the start of an episode the first frame is repeated, as in training.

Times: ``stamp`` is of the clock that stamps messages, ``arrival`` and ``now`` are ``time.monotonic_ns``.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import ObservationSpec
from dcqfa_ros.runtime.errors import PolicyError
from dcqfa_ros.runtime.key_samples import PICTURES, KeySamples, Sample, stack_rows
from dcqfa_ros.runtime.pictures import PictureHistory

KEPT = 64  # frames, and samples per key, kept at most
PENDING = 8  # newest stamps of the clock for which a frame may still become complete
TOLERANCE_PERIODS, WINDOW_TOLERANCE_PERIODS = 0.9, 1.5
STATE_TOLERANCE_PERIODS = 2.0
"""Of states beside pictures, whose ticks no camera shares: the arm's node reads the controller's newest state, so that
stamps lie up to twice a period apart, and waiting for the next one would cost more time than it lies nearer."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One complete time step.

    Attributes:
        stamp_ns: of the reference.
        values: an array per key.
        awaited_ns: stamp of the newest picture among them that the frame had to wait for, because its key had none
            before within the tolerance; ``stamp_ns`` where there is none. Earlier it could not have been complete.
    """

    stamp_ns: int
    values: Mapping[str, NDArray[Any]]
    awaited_ns: int


class ObservationSynchronizer:
    """Collects samples per key and yields the history that ends at the newest complete frame. Thread-safe.

    Attributes:
        specs: the keys, from the bundle.
        history: frames that the policy reads.
        reference: the key whose stamps are those of the frames.
        dropped: stamps of the reference for which no frame became complete.
    """

    def __init__(
        self,
        specs: Mapping[str, ObservationSpec],
        tolerances_ns: Mapping[str, int] | None = None,
        step_ns: int = 0,
    ) -> None:
        """Set the keys.

        Args:
            specs: the keys, from the bundle.
            tolerances_ns: by key; where one is missing, it follows from the key's rate.
            step_ns: time between the frames of the history; 0: those that came one after the other.

        Raises:
            PolicyError: a tolerance is for a key that there is not.
        """
        self.specs = dict(specs)
        given = dict(tolerances_ns or {})
        unknown = sorted(given.keys() - self.specs.keys())
        if unknown:
            raise PolicyError(f"tolerance for {', '.join(unknown)}: the observations are {', '.join(self.specs)}")
        self.history = max(spec.history for spec in self.specs.values())
        self.reference = reference_of(self.specs)
        self.step_ns = step_ns
        self.dropped = 0
        self._keys = {
            name: KeySamples(name, spec, given.get(name, default_tolerance_ns(spec, self.specs[self.reference])))
            for name, spec in self.specs.items()
        }
        self._cheapest_first = sorted(self._keys.items(), key=lambda item: item[1].is_window)
        self._condition = threading.Condition()
        self._pending: list[Sample] = []  # of the reference, rising stamps
        self._frames: list[Frame] = []  # rising stamps
        self._start_ns: int | None = None
        self._waiting_ns: int | None = None  # since when (arrival) the reference has come without a frame

    @property
    def tolerances_ns(self) -> dict[str, int]:
        """Tolerance per key; that of the reference has no meaning."""
        return {name: key.tolerance_ns for name, key in self._keys.items()}

    def begin(self, start_ns: int) -> None:
        """Begin an episode: frames stamped before ``start_ns`` are never used again."""
        with self._condition:
            self._start_ns = start_ns
            self._condition.notify_all()

    def end(self) -> None:
        """End the episode: ``wait_for`` yields nothing until the next ``begin``."""
        with self._condition:
            self._start_ns = None
            self._condition.notify_all()

    def add(self, key: str, stamp_ns: int, value: NDArray[Any], arrival_ns: int) -> None:
        """Add one sample, in the bundle's units: of a window one row, of a picture a view of its message.

        Raises:
            PolicyError: unknown key, wrong shape or dtype, or NaN or infinity; nothing is stored.
        """
        entry = self._keys.get(key)
        if entry is None:
            raise PolicyError(f"observation {key!r} is not one of {', '.join(self.specs)}")
        sample = Sample(stamp_ns, entry.prepared(value))
        with self._condition:
            entry.arrival_ns = arrival_ns
            began_anew = bool(entry.stamp_ns) and stamp_ns < entry.stamp_ns
            entry.stamp_ns = stamp_ns
            if key == self.reference:
                self._add_reference(sample, arrival_ns, began_anew)
            else:
                self._add_sample(entry, sample, began_anew)
            self._complete(entry, stamp_ns)

    def _add_reference(self, sample: Sample, arrival_ns: int, began_anew: bool) -> None:
        if began_anew:  # the source's clock began anew: nothing of before belongs to what follows
            self._pending.clear()
            self._frames.clear()
        if self._frames and self._frames[-1].stamp_ns == sample.stamp_ns:
            self._waiting_ns = None
            return  # the same time step, measured again
        if self._pending and self._pending[-1].stamp_ns == sample.stamp_ns:
            self._pending.pop()
        self._pending.append(sample)
        if self._waiting_ns is None:
            self._waiting_ns = arrival_ns
        while len(self._pending) > PENDING:
            self._pending.pop(0)
            self.dropped += 1

    def _add_sample(self, entry: KeySamples, sample: Sample, began_anew: bool) -> None:
        samples = entry.samples
        if began_anew:
            samples.clear()
        entry.keep(sample)
        most = entry.spec.shape[0] + KEPT if entry.is_window else PENDING if entry.spec.type in PICTURES else KEPT
        while len(samples) > most:
            samples.popleft()

    def _complete(self, entry: KeySamples, stamp_ns: int) -> None:
        """Make frames of the stamps for which every key has come; older stamps than the newest frame's may follow.

        Looks at those alone that the new sample of ``entry`` can complete: stamps that never will are kept for a while.
        """
        waiting: list[Sample] = []
        news = False
        for reference in self._pending:
            samples = self._others(reference.stamp_ns) if self._touches(entry, stamp_ns, reference.stamp_ns) else None
            if samples is None:
                waiting.append(reference)
                continue
            samples[self.reference] = reference
            insort(self._frames, self._frame(reference.stamp_ns, samples), key=lambda frame: frame.stamp_ns)  # type: ignore[arg-type]
            self._waiting_ns, news = None, True
        self._pending = waiting
        if news:
            del self._frames[: self._expired()]
            self._condition.notify_all()

    def _touches(self, entry: KeySamples, stamp_ns: int, reference_ns: int) -> bool:
        """Whether a sample of ``entry`` may be part of the frame of a stamp of the reference."""
        if entry.name == self.reference:
            return stamp_ns == reference_ns
        return stamp_ns <= reference_ns if entry.is_window else abs(stamp_ns - reference_ns) <= entry.tolerance_ns

    def _frame(self, stamp_ns: int, samples: Mapping[str, Sample]) -> Frame:
        awaited = [
            sample.stamp_ns
            for name, sample in samples.items()
            if self.specs[name].type in PICTURES and not self._keys[name].has_before(stamp_ns)
        ]
        return Frame(stamp_ns, {name: samples[name].value for name in self.specs}, max([stamp_ns, *awaited]))

    def _others(self, stamp_ns: int) -> dict[str, Sample] | None:
        """Samples of all keys but the reference for a frame, None where one has not come; asked at every sample."""
        samples: dict[str, Sample] = {}
        for name, key in self._cheapest_first:
            if name != self.reference:
                sample, _ = key.at(stamp_ns)
                if sample is None:
                    return None
                samples[name] = sample
        return samples

    def _expired(self) -> int:
        """Return how many frames no history reaches back to any more."""
        spare = max(0, len(self._frames) - KEPT)
        if not self.step_ns:
            return max(spare, len(self._frames) - (self.history + PENDING))
        oldest = self._frames[-1].stamp_ns - self.history * self.step_ns
        return max(spare, bisect_right(self._frames, oldest, key=lambda frame: frame.stamp_ns) - 1)

    def wait_for(self, due_ns: int, timeout_s: float) -> list[Frame] | None:
        """The history that ends at the newest frame, once one of this episode is stamped ``due_ns`` or later.

        Returns:
            ``history`` frames, oldest first (the episode's first frame repeated where there are fewer), or None when
            none came within ``timeout_s`` seconds or no episode is under way.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._ready(due_ns), timeout_s):
                return None
            frames = [f for f in self._frames if f.stamp_ns >= (self._start_ns or 0)]
        return self._history(frames)

    def _history(self, frames: list[Frame]) -> list[Frame]:
        """Choose the newest frame and those one step apart before it; ``frames`` rise and are not empty."""
        if not self.step_ns:
            window = frames[-self.history :]
            return [window[0]] * (self.history - len(window)) + window
        chosen = [frames[-1]]
        for back in range(1, self.history):
            wanted = frames[-1].stamp_ns - back * self.step_ns
            before = [f for f in frames if f.stamp_ns <= chosen[0].stamp_ns - self.step_ns // 2]
            nearest = min(before, key=lambda f: abs(f.stamp_ns - wanted), default=frames[0])
            chosen.insert(0, nearest)
        return chosen

    def _ready(self, due_ns: int) -> bool:
        start = self._start_ns
        return bool(self._frames) and start is not None and self._frames[-1].stamp_ns >= max(due_ns, start)

    def missing(self) -> str:
        """Which keys keep the newest stamp of the reference from becoming a frame, and why; empty where none does."""
        with self._condition:
            if not self._pending:
                return ""
            stamp_ns = self._pending[-1].stamp_ns
            told = [
                f"{name!r} {key.at(stamp_ns)[1]}"
                for name, key in self._keys.items()
                if name != self.reference and key.at(stamp_ns)[0] is None
            ]
            return f"observation {' and '.join(told)} (to {self.reference!r})" if told else ""

    def stalled(self, now_ns: int) -> str:
        """Why no frame has become complete for longer than the reference may be old; empty where one has.

        Every key may come on time and yet none within the tolerance: of another clock, or at another rate.
        """
        with self._condition:
            since = self._waiting_ns
            if since is None or now_ns - since <= self.specs[self.reference].max_age_ms * 1e6:
                return ""
        return self.missing()

    def ages_ms(self, now_ns: int, used_ns: int | None = None) -> dict[str, float | None]:
        """Age per key in milliseconds; None where nothing has come.

        Args:
            now_ns: monotonic time.
            used_ns: stamp of the frame that is about to be used. Its age is the monotonic age of what came last plus by
                how much its stamp lies behind the newest stamp of any key; without it, only the former is told.
        """
        with self._condition:
            seen = {name: key for name, key in self._keys.items() if key.arrival_ns is not None}
            newest = max((key.stamp_ns for key in seen.values()), default=0)
            behind = max(0, newest - used_ns) if used_ns is not None else 0
            ages = {name: (now_ns - (key.arrival_ns or 0) + behind) / 1e6 for name, key in seen.items()}
            return {name: ages.get(name) for name in self.specs}


def reference_of(specs: Mapping[str, ObservationSpec]) -> str:
    """Return the key that is the clock: the first image, else the first depth picture, else the first key."""
    for kind in PICTURES:
        for name, spec in specs.items():
            if spec.type == kind:
                return name
    return next((name for name, spec in specs.items() if spec.type != "wrench"), next(iter(specs)))


def default_tolerance_ns(spec: ObservationSpec, reference: ObservationSpec) -> int:
    """Return the tolerance that follows from a key's rate, and from what the reference is."""
    periods = TOLERANCE_PERIODS
    if spec.type == "wrench":
        periods = WINDOW_TOLERANCE_PERIODS
    elif spec.type not in PICTURES and reference.type in PICTURES:
        periods = STATE_TOLERANCE_PERIODS
    return round(periods * 1e9 / spec.rate_hz)


def stack_history(frames: list[Frame], specs: Mapping[str, ObservationSpec]) -> dict[str, Any]:
    """Batch-1 observation per key from frames, oldest first.

    Returns:
        Arrays (1, history, *shape); for pictures a :class:`~dcqfa_ros.runtime.pictures.PictureHistory`, not copied.
    """
    stacked: dict[str, Any] = {}
    for key, spec in specs.items():
        values = [frame.values[key] for frame in frames[-spec.history :]]
        stacked[key] = PictureHistory(values) if spec.type in PICTURES else stack_rows(values)[None]
    return stacked
