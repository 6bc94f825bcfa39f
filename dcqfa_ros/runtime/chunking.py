"""How action chunks follow each other: methods, soft mask, and the bookkeeping of one episode.

Actions of an episode are numbered from 0 in the order in which the arm consumes them. ``H`` is the number of action
tokens of a prediction, of which the first ``f`` (``first_executed``) lie before the observation's time; ``A = H - f``
actions can be executed. ``d`` is the delay (actions consumed between an observation and the arrival of its chunk) and
``s`` the execution horizon (actions consumed between two observations that are inferred on); ``d <= s <= A - d``.

Sources: ACT, Zhao et al. 2023 (temporal ensembling); real-time chunking, Black et al. 2025 (soft mask, guidance);
training-time real-time chunking, Black et al. 2025 (clean prefix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import ActionSpec

Float32 = NDArray[np.float32]

ENSEMBLE_DECAY = 0.01  # ACT's m: prediction k of one action, the oldest being 0, weighs exp(-m k)


class Method(str, Enum):
    """How one chunk follows another.

    SYNCHRONOUS infers when the executed actions are used up; the arm waits. All others infer after ``s`` actions while
    the rest of the chunk goes on: ASYNCHRONOUS replaces what is left, ENSEMBLE averages all predictions of an action,
    SOFT and GUIDED draw the new chunk towards the previous one while it is denoised (GUIDED with the denoiser's
    vector-Jacobian product), TRAINED hands the actions that cannot be changed any more to a network trained for it.
    """

    SYNCHRONOUS = "synchronous"
    ASYNCHRONOUS = "asynchronous"
    ENSEMBLE = "ensemble"
    SOFT = "soft"
    GUIDED = "guided"
    TRAINED = "trained"

    @property
    def overlaps(self) -> bool:
        """Whether the arm goes on with a chunk while the next one is inferred."""
        return self is not Method.SYNCHRONOUS

    @property
    def continues(self) -> bool:
        """Whether the previous chunk takes part in denoising the next one."""
        return self in (Method.SOFT, Method.GUIDED, Method.TRAINED)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a new chunk has to continue.

    Attributes:
        previous: (n, Da), float32, raw units, ``1 <= n <= H``: what the previous chunk says for the coming actions. Row
            0 belongs to token 0 of the new chunk; the ``first_executed`` past tokens are executed already and known.
        frozen: number of leading rows that will have been executed when the new chunk arrives, 0 to n.
        horizon: actions consumed since the previous chunk's observation, ``s`` of the soft mask.
        method: SOFT, GUIDED or TRAINED.
    """

    previous: Float32
    frozen: int
    horizon: int
    method: Method


@dataclass(frozen=True, slots=True)
class Timing:
    """Delay and execution horizon in actions, and what was changed to make them fit ("" where nothing was)."""

    delay: int
    horizon: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Inference:
    """What to ask of the policy for one observation.

    Attributes:
        first: number of the action that belongs to the observation's time: actions consumed by then.
        actions: actions to predict from there on.
        timing: delay and execution horizon it was planned with.
        continuation: of the previous chunk, or None where there is none to continue.
    """

    first: int
    actions: int
    timing: Timing
    continuation: Continuation | None


@dataclass(frozen=True, slots=True)
class Published:
    """A chunk for the arm.

    Attributes:
        first: number of its first action.
        actions: (n, Da), float32, raw units.
        taken: number of the first action that the arm can still take from it.
        jump: Euclidean distance (units of the action) between action ``taken`` and the one executed before it; None
            for the first chunk.
    """

    first: int
    actions: Float32
    taken: int
    jump: float | None


def soft_mask(tokens: int, frozen: int, horizon: int, known: int) -> NDArray[np.float64]:
    """Return how strongly each token of a new chunk is held to the previous one, shape (tokens,), 0 to 1.

    1 for the frozen tokens, then ``W = c (e^c - 1) / (e - 1)`` with ``c = (m - i) / (m - frozen + 1)`` up to token
    ``m = tokens - horizon``, 0 after. Where fewer rows of the previous chunk are known, m is their number.

    Args:
        tokens: H, at least 1.
        frozen: leading tokens that are executed before the chunk arrives.
        horizon: s.
        known: rows of the previous chunk.

    Raises:
        ValueError: a number is negative, or ``frozen`` exceeds ``known``.
    """
    if min(tokens - 1, frozen, horizon, known) < 0 or frozen > min(known, tokens):
        raise ValueError(
            f"soft mask: expected 0 <= frozen <= known, frozen <= tokens and horizon >= 0, "
            f"got frozen {frozen}, known {known}, tokens {tokens}, horizon {horizon}"
        )
    index = np.arange(tokens, dtype=np.float64)
    last = max(frozen, min(tokens - horizon, known))
    c = (last - index) / (last - frozen + 1)
    decaying = c * np.expm1(c) / math.expm1(1.0)
    return np.where(index < frozen, 1.0, np.where(index < last, decaying, 0.0))


def fit_timing(method: Method, horizon: int, delay: int, available: int, prefix: int | None = None) -> Timing:
    """Bring delay and execution horizon into ``d <= s <= A - d``; the note says what did not fit.

    Args:
        method: SYNCHRONOUS takes no delay into account.
        horizon: s as wanted, at least 1.
        delay: d as measured or given, at least 0.
        available: A, actions of a prediction that can be executed.
        prefix: largest delay that the network was trained for (TRAINED); None: any.

    Raises:
        ValueError: horizon or available is below 1, or delay or prefix is negative.
    """
    if horizon < 1 or available < 1 or delay < 0 or (prefix is not None and prefix < 0):
        raise ValueError(
            f"chunk timing: expected horizon and available of at least 1 and no negative delay or prefix, "
            f"got horizon {horizon}, available {available}, delay {delay}, prefix {prefix}"
        )
    if not method.overlaps:
        fitted = min(horizon, available)
        return Timing(0, fitted, "" if fitted == horizon else f"execution horizon {horizon} cut to {fitted}")
    notes = []
    longest = available // 2
    used = min(delay, longest)
    if used < delay:
        notes.append(f"delay {delay} exceeds half of the {available} actions of a chunk: taken as {used}")
    if prefix is not None and used > prefix:
        notes.append(f"delay {used} exceeds what the network was trained for: taken as {prefix}")
        used = prefix
    fitted = max(used, min(horizon, available - used))
    if fitted != horizon:
        notes.append(f"execution horizon {horizon} does not fit delay {used}: taken as {fitted}")
    return Timing(used, fitted, "; ".join(notes))


class ChunkPlan:
    """Bookkeeping of one episode: when to infer, what to continue, and what to publish.

    The caller tells how many actions the arm had consumed at an observation and when a chunk was published; the plan
    never counts time. Everything a prediction holds is published: what lies beyond ``s + d`` is a reserve, consumed
    only where an inference takes longer than its delay. Not thread-safe.

    Attributes:
        method: how chunks follow each other.
        horizon: execution horizon as wanted.
        due: the next inference is due when the arm has consumed this many actions.
        end: number of the action after the last one published.
    """

    def __init__(self, action: ActionSpec, method: Method, execution_horizon: int = 0, prefix: int = 0) -> None:
        """Plan for chunks of ``action``.

        Args:
            action: the bundle's action.
            method: how chunks follow each other.
            execution_horizon: s as wanted; 0: the bundle's ``executed``.
            prefix: the bundle's ``diffusion.prefix``: leading clean tokens the network was trained for.

        Raises:
            ValueError: TRAINED without a prefix beyond the past tokens, or a negative horizon or prefix.
        """
        self._action = action
        self.configure(method, execution_horizon, prefix)
        self.reset()

    def configure(self, method: Method, execution_horizon: int = 0, prefix: int = 0) -> None:
        """Change the method from the next inference on; what is published stays.

        Raises:
            ValueError: as the constructor.
        """
        if execution_horizon < 0 or prefix < 0:
            raise ValueError(
                f"chunk plan: expected no negative number, got execution horizon {execution_horizon}, prefix {prefix}"
            )
        if method is Method.TRAINED and prefix <= self._action.first_executed:
            raise ValueError(
                f"chunk plan: method trained needs a network trained with more than {self._action.first_executed} "
                f"clean leading tokens, the bundle's diffusion.prefix is {prefix}"
            )
        self.method, self.prefix = method, prefix
        self.horizon = execution_horizon or self._action.executed
        self._sums: dict[int, tuple[NDArray[np.float64], float, int]] = {}  # ensemble: weighted sum, weight, count

    def reset(self) -> None:
        """Begin an episode: nothing is published."""
        self.due = self.end = 0
        self._first: int | None = None  # of the last chunk
        self._kept: dict[int, Float32] = {}  # number -> action as published and, where consumed, executed
        self._sums = {}

    def resume(self, consumed: int) -> None:
        """Go on behind ``consumed`` actions that were not published here: nothing is continued."""
        self.reset()
        self.due = self.end = consumed

    @property
    def first(self) -> int:
        """Number of the first action of the last chunk: an observation of earlier than that is not inferred on."""
        return self.end if self._first is None else self._first

    @property
    def available(self) -> int:
        """Actions of one prediction that can be executed."""
        return self._action.horizon - self._action.first_executed

    def timing(self, delay: int) -> Timing:
        """Return delay and execution horizon as they are used for a delay of ``delay`` actions.

        Raises:
            ValueError: the delay is negative.
        """
        longest = self.prefix - self._action.first_executed if self.method is Method.TRAINED else None
        return fit_timing(self.method, self.horizon, delay, self.available, longest)

    def begin(self, consumed: int, delay: int) -> Inference:
        """Plan an inference on an observation.

        Args:
            consumed: actions consumed when the observation was taken.
            delay: actions that will be consumed until the chunk arrives.

        Raises:
            ValueError: ``consumed`` lies before the last chunk's observation or beyond what was published, or the
                delay is negative.
        """
        if not self.first <= consumed <= self.end:
            raise ValueError(
                f"chunk plan: expected {self.first} to {self.end} consumed actions (those since the last "
                f"observation that were published), got {consumed}"
            )
        timing = self.timing(delay)
        actions = self.available if self.method.overlaps else timing.horizon
        return Inference(consumed, actions, timing, self._continuation(consumed, timing))

    def _continuation(self, consumed: int, timing: Timing) -> Continuation | None:
        if not self.method.continues or self._first is None:
            return None
        first = self._action.first_executed
        # The past actions of the first ones are those themselves, as training pads an episode's start.
        numbers = [max(0, n) for n in range(consumed - first, min(self.end, consumed + self.available))]
        if not numbers:
            return None  # nothing executed is among the tokens, and nothing is left
        if numbers[0] not in self._kept:
            return None  # executed before the plan resumed: the past tokens are not known
        previous = np.stack([self._kept[n] for n in numbers])
        # An arm without actions waits: then nothing but the past tokens is executed meanwhile.
        frozen = min(first + timing.delay, len(previous))
        return Continuation(previous, frozen, consumed - self._first, self.method)

    def finish(self, inference: Inference, prediction: NDArray[Any], consumed: int | None = None) -> Published:
        """Take a prediction and return what to publish; the inference counts from here on.

        Args:
            inference: as :meth:`begin` returned it.
            prediction: (inference.actions, Da), raw units; row 0 belongs to the observation's time.
            consumed: actions consumed now, when the chunk is published; None: as many as the delay foresees.

        Raises:
            ValueError: wrong shape, an inference that began before the last one published, or ``consumed`` outside
                what was published since the observation. The plan is then unchanged.
        """
        first, count = inference.first, inference.actions
        shape = (count, self._action.dim)
        if prediction.shape != shape:
            raise ValueError(f"chunk plan: expected a prediction of shape {shape}, got {prediction.shape}")
        if first < (self._first or 0):
            raise ValueError(f"chunk plan: the inference began at action {first}, a later one ({self._first}) is done")
        taken = min(first + inference.timing.delay, self.end) if consumed is None else consumed
        if not first <= taken <= max(first, self.end):
            raise ValueError(
                f"chunk plan: expected {first} to {max(first, self.end)} consumed actions at publication, got {taken}"
            )
        actions = np.asarray(prediction, np.float32)
        if self.method is Method.ENSEMBLE:
            actions = self._average(first, prediction)
        before = self._kept.get(taken - 1)
        jump = None
        if before is not None and taken - first < count:
            apart = np.asarray(actions[taken - first] - before, np.float64)
            jump = math.sqrt(float(apart @ apart))
        oldest = first - self._action.first_executed  # what later continuations and jumps can still need
        self._kept = {n: row for n, row in self._kept.items() if oldest <= n < taken}
        self._kept |= dict(zip(range(taken, first + count), actions[taken - first :].copy(), strict=True))
        self._first, self.end = first, max(taken, first + count)
        self.due = first + inference.timing.horizon if self.method.overlaps else self.end
        return Published(first, actions, taken, jump)

    def _average(self, first: int, prediction: NDArray[Any]) -> Float32:
        """Add a prediction (n, Da) to those of the same actions and return their weighted means."""
        self._sums = {n: entry for n, entry in self._sums.items() if n >= first}
        means = np.empty(prediction.shape, np.float32)
        for row, action in enumerate(np.asarray(prediction, np.float64)):
            total, weight, count = self._sums.get(first + row, (np.zeros_like(action), 0.0, 0))
            share = math.exp(-ENSEMBLE_DECAY * count)
            total, weight = total + share * action, weight + share
            self._sums[first + row] = total, weight, count + 1
            means[row] = total / weight
        return means
