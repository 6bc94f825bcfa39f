"""What training an entry took, from its own records: steps, hours on the clock, calls of the teacher.

Hours are those of the TensorBoard events beside a checkpoint, on whatever machine it was, beside whatever ran there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from dcqfa_ros.bundle.strict import StrictModel
from training.compare.config import CompareError, StatedCost
from training.config import TrainConfig

PAUSE = 20.0  # an interval this many times the median one is a machine that stood still, not training
EVENTS = "events.out.tfevents.*"


class Cost(StrictModel):
    """Training cost of an entry beyond the full-precision policy.

    Attributes:
        steps: optimizer steps; None where nothing was trained or nothing is known.
        hours: on the clock.
        teacher_calls: samples that the frozen teacher computed in training steps (saliency, once per run, not counted).
        policy_calls: forward passes of one observation for calibration.
        source: where the figures come from.
    """

    steps: int | None = None
    hours: float | None = None
    teacher_calls: int | None = None
    policy_calls: int | None = None
    source: str


def training_cost(
    path: Path, config: TrainConfig, step: int, payload: Mapping[str, Any], stated: StatedCost | None
) -> Cost:
    """Cost of the run behind a checkpoint.

    Args:
        path: the checkpoint file.
        config: of the run.
        step: its optimizer steps.
        payload: of the checkpoint; ``teacher_calls`` in it counts before what the configuration tells.
        stated: what the comparison's author adds where records are silent.

    Raises:
        CompareError: an event file is damaged.
    """
    hours, sources = event_hours(path.parent), [f"{step} steps by the checkpoint"]
    calls = payload.get("teacher_calls")
    calls = int(calls) if isinstance(calls, int) else step * teacher_batch(config)
    if hours is not None:
        sources.append("hours by its event files")
    elif stated is not None and stated.hours is not None:
        hours = stated.hours
        sources.append(f"hours: {stated.source}")
    if stated is not None and stated.teacher_calls is not None:
        calls = stated.teacher_calls
        sources.append(f"teacher calls: {stated.source}")
    return Cost(steps=step, hours=hours, teacher_calls=calls, source="; ".join(sources))


def teacher_batch(config: TrainConfig) -> int:
    """Samples that the teacher computes in a training step: a supernet's largest batch; 0 for a plain policy."""
    if config.supernet is None:
        return 0
    sandwich = config.supernet.sandwich
    if config.supernet.only is not None:
        return sandwich.sampled_batch
    batches = [sandwich.largest_batch, sandwich.low_batch, sandwich.smallest_batch]
    return max([*batches, sandwich.sampled_batch] if sandwich.sampled else batches)


def event_hours(folder: Path) -> float | None:
    """Hours that the event files of a run folder cover, pauses left out; None where there are none.

    Raises:
        CompareError: a file is damaged.
    """
    total, seen = 0.0, False
    for file in sorted(folder.glob(EVENTS)):
        times = sorted(set(_times(file)))
        gaps = [after - before for before, after in pairwise(times)]
        if gaps:
            typical = median(gaps)
            total += sum(gap for gap in gaps if gap <= PAUSE * typical)
            seen = True
    return total / 3600.0 if seen else None


def _times(file: Path) -> Iterator[float]:
    """Clock times of the steps in an event file, one per step."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    try:
        last = -1
        for event in EventFileLoader(str(file)).Load():
            if event.step != last:
                last = event.step
                yield float(event.wall_time)
    except Exception as error:  # tensorboard raises many unrelated types for damaged files
        raise CompareError(f"{file}: not a readable event file ({error}); restore or remove it") from error
