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
from training.checkpoint import CHECKPOINT, load_checkpoint
from training.compare.config import CompareError, StatedCost
from training.config import TrainConfig
from training.trained import policy_meaning
from training.warm_start import policy_beside

PAUSE = 20.0  # an interval this many times the median one is a machine that stood still, not training
EVENTS = "events.out.tfevents.*"


class Cost(StrictModel):
    """Training cost of an entry beyond the full-precision policy.

    Attributes:
        steps: optimizer steps; None where nothing was trained or nothing is known.
        hours: on the clock.
        teacher_calls: samples at which the frozen teacher was evaluated, a denoising step of a rollout each
            (saliency, once per run, not counted).
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
    """Cost of the run behind a checkpoint, with that of the supernet that a distillation started from.

    Args:
        path: the checkpoint file.
        config: of the run.
        step: its optimizer steps.
        payload: of the checkpoint; in that of a distillation ``teacher_calls`` counts the chunks of its rollouts.
        stated: what the comparison's author adds where records are silent; hours of a distillation are stated with
            those of the supernet before it.

    Raises:
        CompareError: an event file is damaged.
        CheckpointError: the supernet that a distillation started from is damaged.
    """
    hours, sources = event_hours(path.parent), [f"{step} steps by the checkpoint"]
    calls = step * teacher_batch(config)
    if config.distill is not None and isinstance(payload.get("teacher_calls"), int):
        calls += payload["teacher_calls"] * config.distill.denoising_steps
    if hours is not None:
        sources.append("hours by its event files")
    elif config.distill is None and stated is not None and stated.hours is not None:
        hours = stated.hours
        sources.append(f"hours: {stated.source}")
    if stated is not None and stated.teacher_calls is not None:
        calls = stated.teacher_calls
        sources.append(f"teacher calls: {stated.source}")
    own = Cost(steps=step, hours=hours, teacher_calls=calls, source="; ".join(sources))
    if config.distill is None:
        return own
    whole = _after(own, policy_beside(path, config.distill.start), config.distill.start)
    if whole.hours is None and stated is not None and stated.hours is not None:
        return whole.model_copy(
            update={"hours": stated.hours, "source": f"{whole.source}; hours of all: {stated.source}"}
        )
    return whole


def _after(own: Cost, start: Path, written: str) -> Cost:
    """The cost of a distillation and of the supernet before it."""
    file = start / CHECKPOINT if start.is_dir() else start
    if not file.is_file():
        alone = "" if own.hours is None else f", {own.hours:.2f} h of it alone"
        return own.model_copy(
            update={"hours": None, "source": f"{own.source}; without {written}, which it started from{alone}"}
        )
    payload = load_checkpoint(file)
    meaning = policy_meaning(file, payload)
    before = training_cost(file, meaning.config, meaning.step, payload, None)
    hours = None if own.hours is None or before.hours is None else own.hours + before.hours
    told = [f"{cost.hours:.2f} h of {name} alone" for cost, name in ((own, "it"), (before, written)) if cost.hours]
    return Cost(
        steps=(own.steps or 0) + (before.steps or 0),
        hours=hours,
        teacher_calls=(own.teacher_calls or 0) + (before.teacher_calls or 0),
        source=f"{own.source}, after {before.steps} steps of {written}"
        + (f" ({told[0]})" if hours is None and told else ""),
    )


def teacher_batch(config: TrainConfig) -> int:
    """Samples that the teacher computes in a training step: a supernet's largest batch; 0 for a plain policy.

    A distillation asks it for as many visited states again.
    """
    if config.supernet is None:
        return 0
    sandwich = config.supernet.sandwich
    batches = [sandwich.largest_batch, sandwich.low_batch, sandwich.smallest_batch]
    if config.supernet.only is not None:
        batches = [sandwich.sampled_batch]
    elif sandwich.sampled:
        batches.append(sandwich.sampled_batch)
    return max(batches) * (1 if config.distill is None else 2)


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
