"""The table of methods and latencies: scores with intervals, losses in pairs, smoothness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dcqfa_ros.bench.chunking_record import Outcome
from dcqfa_ros.runtime.chunking import Method
from dcqfa_ros.trials.statistics import Interval, mean_interval, paired_difference

MARGIN = 0.03  # of score: what a latency may cost


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference of scores over pairs of one seed, with its 95 % interval (None for one pair).

    Attributes:
        mean: this row less the other one.
        interval: of the mean.
        within_margin: whether the mean is above ``-MARGIN``: what was seen.
        shown_within_margin: whether the whole interval is: what is shown.
    """

    mean: float
    interval: tuple[float, float] | None
    within_margin: bool
    shown_within_margin: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one latency. Intervals are of 95 % over seeds, None for a single one.

    Attributes:
        method: how one chunk follows another.
        delay: injected latency of an inference, ms.
        delay_ticks: control periods it costs.
        score: mean over seeds, 0..1.
        interval: of the score.
        against_no_delay: the same method without latency; None where that row is not there.
        against_synchronous: synchronous execution at this latency; None where that row is not there.
        jerk: mean size of the jerk of the commanded targets, px/s^3.
        jerk_interval: of it.
        agent_jerk: the same of the arm's motion.
        agent_jerk_interval: of it.
        discontinuity: mean distance, px, between what the old chunk says for the first action taken from a new one, and
            what the new one says.
        discontinuity_p95: 95th percentile of the same.
        seams: changes of chunk behind it.
        jump: mean distance, px, from the action executed last to the first one taken from a new chunk.
        steps: control ticks executed per episode, mean.
        starved_share: share of them without an action.
        chunks: inferences per episode, mean.
        late: chunks that came when all their actions had been consumed.
        seeds: number of seeds.
        first_seed: the first of them.
        bundle: name of the bundle.
        variant: of it.
        note: what was not as asked for, empty where nothing.
        seconds: computing time.
    """

    method: str
    delay: float
    delay_ticks: int
    score: float
    interval: tuple[float, float] | None
    against_no_delay: Difference | None
    against_synchronous: Difference | None
    jerk: float | None
    jerk_interval: tuple[float, float] | None
    agent_jerk: float | None
    agent_jerk_interval: tuple[float, float] | None
    discontinuity: float | None
    discontinuity_p95: float | None
    seams: int
    jump: float | None
    steps: float
    starved_share: float
    chunks: float
    late: int
    seeds: int
    first_seed: int
    bundle: str
    variant: str
    note: str
    seconds: float


def make_rows(
    outcomes: Sequence[Outcome], delays: Mapping[float, int], first_seed: int, notes: Mapping[Method, str]
) -> list[Row]:
    """Return a row per outcome and latency, method by method.

    Args:
        outcomes: one per method and number of ticks.
        delays: latency in ms -> control periods.
        first_seed: of all outcomes.
        notes: per method, what was not as asked for.
    """
    known = {(outcome.method, outcome.ticks): outcome for outcome in outcomes}
    rows = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        for delay, ticks in delays.items():
            outcome = known.get((method, ticks))
            if outcome is None:
                continue
            zero, synchronous = known.get((method, 0)), known.get((Method.SYNCHRONOUS, ticks))
            rows.append(
                _row(
                    outcome,
                    delay,
                    first_seed,
                    "; ".join(filter(None, (notes.get(method, ""), outcome.timing_note))),
                    zero if ticks else None,
                    synchronous if method is not Method.SYNCHRONOUS else None,
                )
            )
    return rows


def _row(
    outcome: Outcome, delay: float, first_seed: int, note: str, zero: Outcome | None, synchronous: Outcome | None
) -> Row:
    count, ticks = len(outcome.scores), sum(outcome.steps)
    score, jerk, agent = mean_interval(outcome.scores), _known(outcome.jerk), _known(outcome.agent_jerk)
    return Row(
        method=outcome.method.value,
        delay=delay,
        delay_ticks=outcome.ticks,
        score=score.estimate,
        interval=_ends(score),
        against_no_delay=_difference(outcome, zero),
        against_synchronous=_difference(outcome, synchronous),
        jerk=jerk.estimate if jerk else None,
        jerk_interval=_ends(jerk),
        agent_jerk=agent.estimate if agent else None,
        agent_jerk_interval=_ends(agent),
        discontinuity=outcome.discontinuity,
        discontinuity_p95=outcome.discontinuity_p95,
        seams=outcome.seams,
        jump=outcome.jump,
        steps=ticks / count,
        starved_share=sum(outcome.starved) / ticks if ticks else 0.0,
        chunks=sum(outcome.chunks) / count,
        late=outcome.late,
        seeds=count,
        first_seed=first_seed,
        bundle=outcome.bundle,
        variant=outcome.variant,
        note=note,
        seconds=outcome.seconds,
    )


def _known(values: Sequence[float | None]) -> Interval | None:
    """Mean over the episodes that were long enough to tell."""
    known = [value for value in values if value is not None]
    return mean_interval(known) if known else None


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    if interval is None or interval.low is None or interval.high is None:
        return None
    return interval.low, interval.high


def _difference(ours: Outcome, other: Outcome | None) -> Difference | None:
    if other is None:
        return None
    first, second = (dict(enumerate(outcome.scores)) for outcome in (ours, other))
    found = paired_difference(first, second)
    return Difference(found.estimate, _ends(found), found.estimate >= -MARGIN, found.not_below(MARGIN))


def describe(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table as lines of text."""
    yield (
        f"{'method':<14}{'delay ms':>9}{'score':>16}{'loss to 0 ms':>18}{'jump old/new px':>17}{'p95':>7}"
        f"{'jerk px/s3':>12}{'of arm':>9}{'starved':>9}{'steps':>7}  variant"
    )
    for row in rows:
        score = f"{row.score:.3f}{_plus_minus(row.score, row.interval)}"
        zero = row.against_no_delay
        loss = "-" if zero is None else f"{zero.mean:+.3f}{_plus_minus(zero.mean, zero.interval)}"
        yield (
            f"{row.method:<14}{row.delay:>9g}{score:>16}{loss:>18}{_number(row.discontinuity, 1):>17}"
            f"{_number(row.discontinuity_p95, 1):>7}{_number(row.jerk, 0):>12}{_number(row.agent_jerk, 0):>9}"
            f"{100 * row.starved_share:>8.1f}%{row.steps:>7.0f}  {row.bundle}/{row.variant}"
        )
    for note in dict.fromkeys((row.method, row.delay, row.note) for row in rows if row.note):
        yield f"{note[0]} at {note[1]:g} ms: {note[2]}"


def _plus_minus(mean: float, interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" +- {interval[1] - mean:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
