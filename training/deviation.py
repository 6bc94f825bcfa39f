"""How far a policy's closed loop departs from its teacher's, step by step: the error-accumulation curve.

Teacher and student run from the same start state, and every policy call draws the same noise (per seed and call); each
acts on the states that it reaches itself. At step k of seed s

- ``keypoints_px`` is the mean distance of the block's nine key points between the two runs, which holds position and
  angle in one figure; ``block_px``, ``block_deg`` and ``agent_px`` are its position, its angle (at most 180) and the
  agent's position apart;
- an episode that has ended (coverage above 0.95) keeps its last state, in both runs.

Two curves over policy calls say where that comes from: ``action_px``, the distance of the executed actions, once at the
states that the student visits (``own_states``: what would the teacher do here?) and once at the teacher's
(``teacher_states``), which is quantization error on states that both know. Episodes end, so the number of seeds ``n``
falls along both curves, and at late calls they are of other seeds. What the student's own errors lead to is therefore
``excess``: per seed, the mean of own minus teacher's over the calls that both runs have.

Intervals are 95 % (Student's t over seeds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.errors import UserError
from dcqfa_ros.sim.pusht import EPISODE_STEPS
from dcqfa_ros.sim.tee import key_points
from dcqfa_ros.trials.statistics import mean_interval, student_t_quantile
from training.evaluate import LAST_SEED, Contender, find
from training.rollouts import Trajectories, answers, record

Array = NDArray[np.float64]
STATES = ("keypoints_px", "block_px", "block_deg", "agent_px")
DEFINITION = (
    "mean over seeds of the distance between the states of student and teacher after equally many steps, from equal "
    "start states and with equal noise per (seed, call); an ended episode keeps its last state"
)


class DeviationError(UserError, ValueError):
    """Policies that cannot be compared as asked; the message names the argument."""


def state_deviations(student: Trajectories, teacher: Trajectories) -> dict[str, Array]:
    """Distances of two runs per seed and step, each (N, K + 1); names and units of :data:`STATES`.

    Raises:
        ValueError: the runs are of other seeds or lengths.
    """
    if student.seeds != teacher.seeds or student.states.shape != teacher.states.shape:
        raise ValueError("deviation: runs of the same seeds and steps are compared in pairs")
    mine, theirs = student.states, teacher.states
    turned = np.abs((mine[..., 4] - theirs[..., 4] + np.pi) % (2 * np.pi) - np.pi)
    points = [np.stack([key_points(pose) for pose in states[..., 2:].reshape(-1, 3)]) for states in (mine, theirs)]
    apart = np.linalg.norm(points[0].astype(np.float64) - points[1], axis=-1).mean(-1)
    return {
        "keypoints_px": apart.reshape(mine.shape[:2]),
        "block_px": np.linalg.norm(mine[..., 2:4] - theirs[..., 2:4], axis=-1),
        "block_deg": np.degrees(turned),
        "agent_px": np.linalg.norm(mine[..., :2] - theirs[..., :2], axis=-1),
    }


def action_deviation(first: NDArray[np.float32], second: NDArray[np.float32], called: NDArray[np.bool_]) -> Array:
    """Mean distance in px of the executed actions (N, C, executed, 2) of a call; NaN where there was none."""
    apart = np.linalg.norm(first.astype(np.float64) - second, axis=-1).mean(-1)
    return np.where(called, apart, np.nan)


def excess(own: Array, shown: Array) -> Array:
    """What each seed's actions are further apart at the states of its own run, (N,), over the calls that both have.

    Args:
        own: distances (N, C) at the states that the student visits, NaN where there was no call.
        shown: distances (N, D) at those that the teacher visits, likewise. Every run has a first call.
    """
    calls = min(own.shape[1], shown.shape[1])
    return np.nanmean(own[:, :calls] - shown[:, :calls], axis=1)


def curve(values: Array) -> dict[str, list[Any]]:
    """Mean, half-width of the 95 % interval and number of values per column of (N, K), NaN left out.

    A column of one value has no interval, and one of none has no mean: None.
    """
    mean: list[float | None] = []
    half: list[float | None] = []
    count: list[int] = []
    quantiles: dict[int, float] = {}
    for column in values.T:
        known = column[np.isfinite(column)]
        n = len(known)
        count.append(n)
        mean.append(float(known.mean()) if n else None)
        if n > 1 and n not in quantiles:
            quantiles[n] = student_t_quantile(0.975, n - 1)
        half.append(quantiles[n] * float(known.std(ddof=1)) / float(np.sqrt(n)) if n > 1 else None)
    return {"mean": mean, "ci95": half, "n": count}


def _interval(values: Array) -> dict[str, Any]:
    found = mean_interval(values.tolist())
    return {"mean": found.estimate, "ci95": found.half_width}


def parse_contender(text: str, threads: int | None = None, option: str = "CONTENDER") -> Contender:
    """Find what ``TARGET`` or ``TARGET:VARIANT`` names; see :func:`training.evaluate.find`.

    Raises:
        UserError: there is no such policy or variant, or it is no Push-T policy.
    """
    target, separator, variant = text.rpartition(":")
    if not separator or Path(text).exists():
        return find(text, None, threads, option=option)
    if not (target and variant):
        raise DeviationError(f"{option} {text}: expected POLICY or POLICY:VARIANT")
    return find(target, variant, threads, option=option)


@dataclass(frozen=True, slots=True)
class Options:
    """What is run: seeds, steps of an episode, denoising steps (None: each policy's own), and threads."""

    seeds: tuple[int, ...]
    horizon: int = EPISODE_STEPS
    steps: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            DeviationError: a value is out of range.
        """
        if len(self.seeds) < 2:
            raise DeviationError(f"--seeds: expected at least 2, which an interval needs, got {len(self.seeds)}")
        if min(self.seeds) < 0 or max(self.seeds) > LAST_SEED:
            raise DeviationError(f"seeds {min(self.seeds)} to {max(self.seeds)}: start seeds are 0 to {LAST_SEED}")
        if not 1 <= self.horizon <= EPISODE_STEPS:
            raise DeviationError(f"--horizon: expected 1 to {EPISODE_STEPS} steps, got {self.horizon}")


def measure(
    contenders: Sequence[str],
    teacher: str,
    options: Options,
    say: Callable[[str], object] = str,
) -> dict[str, Any]:
    """Measure how each contender departs from ``teacher``.

    Args:
        contenders: ``TARGET:VARIANT`` each; any that ``dcqfa eval`` evaluates.
        teacher: likewise.
        options: seeds and lengths.
        say: told what runs next.

    Returns:
        A JSON-ready record: ``teacher``, and per contender its ``score``, the curves, ``area`` (mean over the steps of
        each state deviation, with its interval over seeds), ``paired`` (its area in ``keypoints_px`` minus that of the
        first contender on the same seeds, None for the first one) and in ``action_px`` the ``excess`` in px with its
        interval; see :func:`excess`.

    Raises:
        UserError: a policy cannot be read, is none of Push-T, or is named twice; before the first episode.
    """
    found = [parse_contender(name, options.threads) for name in contenders]
    reference = parse_contender(teacher, options.threads, "--teacher")
    _check(contenders, found, teacher, reference, options.steps)
    say(f"teacher {teacher}")
    with reference.open() as policy:
        shown = _run(policy, reference, options, f"teacher {reference.variant}")
    entries: list[dict[str, Any]] = []
    areas: list[Array] = []
    for name, contender in zip(contenders, found, strict=True):
        say(f"contender {name}")
        started = time.monotonic()
        with contender.open() as policy:
            own = _run(policy, contender, options, contender.variant)
            at_teacher = answers(policy, shown, steps=options.steps, title=f"{contender.variant} at teacher's states")
        with reference.open() as policy:
            at_own = answers(policy, own, steps=options.steps, title=f"teacher at states of {contender.variant}")
        states = state_deviations(own, shown)
        at_own_states = action_deviation(own.actions, at_own, own.called)
        at_teacher_states = action_deviation(at_teacher, shown.actions, shown.called)
        area = {key: values[:, 1:].mean(1) for key, values in states.items()}
        areas.append(area["keypoints_px"])
        entries.append(
            _describe(name, contender)
            | {
                "score": _interval(own.scores),
                "area": {key: _interval(values) for key, values in area.items()},
                "paired": None if len(areas) == 1 else _interval(areas[-1] - areas[0]) | {"against": contenders[0]},
                "curves": {key: curve(values) for key, values in states.items()},
                "action_px": {
                    "own_states": curve(at_own_states),
                    "teacher_states": curve(at_teacher_states),
                    "excess": _interval(excess(at_own_states, at_teacher_states)),
                },
                "seconds": round(time.monotonic() - started, 2),
            }
        )
    return {
        "definition": DEFINITION,
        "seeds": [options.seeds[0], options.seeds[-1]],
        "count": len(options.seeds),
        "horizon": options.horizon,
        "teacher": _describe(teacher, reference) | {"score": _interval(shown.scores)},
        "contenders": entries,
    }


def _check(
    names: Sequence[str], found: Sequence[Contender], teacher: str, reference: Contender, steps: int | None
) -> None:
    known: dict[tuple[Path, str], str] = {reference.identity: f"--teacher {teacher}"}
    for name, contender in zip(names, found, strict=True):
        if contender.identity in known:
            raise DeviationError(f"{name}: is the same network as {known[contender.identity]}; name each one once")
        known[contender.identity] = name
        ours, others = contender.spec, reference.spec
        for what, mine, theirs in (
            ("executes {} actions a call", ours.action.executed, others.action.executed),
            ("predicts chunks of {} actions", ours.action.horizon, others.action.horizon),  # the noise is of this shape
            ("takes {} observations a call", _history(ours), _history(others)),
        ):
            if mine != theirs:
                raise DeviationError(f"{name}: {what.format(mine)}, the teacher {theirs}; expected equally many")
    for name, contender in zip((*names, teacher), (*found, reference), strict=True):
        most = contender.spec.diffusion.most_steps
        if steps is not None and not 1 <= steps <= most:
            raise DeviationError(f"--steps {steps}: {name} takes 1 to {most} denoising steps")


def _history(spec: BundleSpec) -> int:
    return next(iter(spec.observations.values())).history


def _run(policy: Any, contender: Contender, options: Options, title: str) -> Trajectories:
    history = _history(contender.spec)
    return record(policy, options.seeds, history, steps=options.steps, limit=options.horizon, title=title)


def _describe(name: str, contender: Contender) -> dict[str, Any]:
    return {
        "name": name,
        "policy": contender.spec.name,
        "variant": contender.variant,
        "subnet": contender.subnet,
        "weights": contender.weights,
        "sampler": contender.spec.diffusion.sampler,
        "threads": contender.threads,
    }
