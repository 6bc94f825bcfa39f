"""Closed-loop evaluation by the published Push-T protocol (``algorithms.md`` section 10).

Worlds start in the legacy state of their seed, run at most 300 steps, and score the maximum over time of
clip(coverage / 0.95, 0, 1). Up to :data:`WORLDS_TOGETHER` worlds share one batched policy call per chunk; noise is
drawn per (seed, chunk), so networks are compared in pairs. A bundle is evaluated without PyTorch; only a checkpoint
imports it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dcqfa_ros.bundle.errors import BundleNotFoundError
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.policy import PolicyRuntime
from dcqfa_ros.trials.statistics import mean_interval, paired_difference
from training.envs.pusht import PushTWorlds, World, WorldState
from training.stress import STANDARD

LAST_SEED = 2**32 - 1  # of the legacy generator that draws start states
WORLDS_TOGETHER = 250  # more would not be faster, and memory grows with them
OBSERVATIONS = {"keypoints", "agent_position"}  # what the Push-T cell offers


class EvaluationError(UserError):
    """A policy that cannot be evaluated; the message says what was expected."""


class ChunkPolicy(Protocol):
    """The part of :class:`PolicyRuntime` that evaluation needs."""

    def predict(
        self,
        observation: Mapping[str, NDArray[Any]],
        seeds: Sequence[int],
        chunks: Sequence[int],
        steps: int | None = None,
    ) -> NDArray[np.float32]:
        """Executed actions (B, executed, Da), raw units."""
        ...


class Task(Protocol):
    """Worlds to act in; :class:`training.stress.Stress` is one."""

    @property
    def episode_steps(self) -> int:
        """Steps after which an episode ends."""
        ...

    def world(self) -> World:
        """A new world."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Score (0..1) and number of executed steps per seed, in seed order."""

    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    steps: tuple[int, ...]


def roll_out(
    policy: ChunkPolicy,
    seeds: Sequence[int],
    history: int,
    steps: int | None = None,
    stress: Task = STANDARD,
    progress: bool = True,
    title: str = "eval",
) -> Scores:
    """Run one episode per seed, at most :data:`WORLDS_TOGETHER` at a time, and return their scores.

    Args:
        policy: predicts the executed actions of a chunk for a batch of observations.
        seeds: legacy start seeds.
        history: observations per policy call.
        steps: denoising steps; None for the bundle's own.
        stress: the worlds, which may be harder than the published ones.
        progress: show it.
        title: of the progress bar.
    """
    finished: list[WorldState] = []
    total = len(seeds) * stress.episode_steps
    with tqdm(total=total, desc=title, unit="step", mininterval=1.0, disable=not progress) as bar:
        for start in range(0, len(seeds), WORLDS_TOGETHER):
            together = seeds[start : start + WORLDS_TOGETHER]
            finished.extend(_episodes(policy, together, history, steps, stress, bar))
            bar.set_postfix(score=f"{np.mean([state.score for state in finished]):.3f}", refresh=False)
    return Scores(tuple(seeds), tuple(state.score for state in finished), tuple(state.steps for state in finished))


def _episodes(
    policy: ChunkPolicy, seeds: Sequence[int], history: int, steps: int | None, stress: Task, bar: tqdm
) -> list[WorldState]:
    """Run one episode per seed, all together, and return their last states."""
    worlds, limit = PushTWorlds(seeds, history, stress.world), stress.episode_steps
    states = worlds.reset()
    active = list(range(len(seeds)))
    chunk = 0
    while active:
        observation = {key: np.stack([states[index].history[key] for index in active]) for key in states[0].history}
        actions = policy.predict(observation, [seeds[i] for i in active], [chunk] * len(active), steps=steps)
        for index, executed in zip(active, actions, strict=True):
            before = states[index].steps
            states[index] = worlds.step(index, executed)
            bar.update((limit if states[index].done else states[index].steps) - before)
        active = [index for index in active if not states[index].done]
        score = np.mean([state.score for state in states])
        bar.set_postfix(score=f"{score:.3f}", active=len(active), refresh=False)
        chunk += 1
    return states


def is_checkpoint(target: str) -> bool:
    """Whether ``target`` is a run folder or a checkpoint file and not a bundle."""
    path = Path(target)
    return path.suffix == ".pt" or (path / "checkpoint.pt").is_file()


@dataclass(frozen=True, slots=True)
class Contender:
    """A network that was found and can be evaluated.

    Attributes:
        spec: what it sees and does.
        variant: its name as asked for; ``checkpoint`` for the one network of a checkpoint.
        subnet: the lossless name of a supernet's subnet, else None.
        weights: SHA-256 of a bundle's denoiser, None for a checkpoint.
        identity: equal for two names of one network.
        threads: inference threads.
        engine: makes the engine.
    """

    spec: BundleSpec
    variant: str
    subnet: str | None
    weights: str | None
    identity: tuple[Path, str]
    threads: int
    engine: Callable[[], Engine]

    @contextmanager
    def open(self) -> Iterator[PolicyRuntime]:
        """The policy, for in-process inference.

        Raises:
            UserError: a file of the network is damaged.
        """
        engine = self.engine()
        try:
            yield PolicyRuntime(self.spec, engine)
        finally:
            engine.close()


def find(
    target: str, variant: str | None, threads: int | None = None, compiled: bool = False, option: str = "--variant"
) -> Contender:
    """Find a bundle's variant, the network of a checkpoint, or a subnet of a supernet's checkpoint.

    Args:
        target: bundle (folder or name), run folder or checkpoint file.
        variant: of the bundle (None: its default), or subnet (None: the largest).
        threads: inference threads; None for every core, and for one in the case of a checkpoint.
        compiled: compile a subnet; no effect on others.
        option: names ``variant`` in errors.

    Raises:
        UserError: bundle or checkpoint cannot be read, has no such variant, or is no Push-T policy.
    """
    if is_checkpoint(target):
        from training.checkpoint_engine import find_variant  # only a checkpoint needs PyTorch

        found, threads = find_variant(Path(target), variant, option), threads or 1
        contender = Contender(
            found.specification,
            found.name,
            found.subnet,
            None,
            (found.source.path.resolve(), found.subnet or found.name),
            threads,
            partial(found.engine, threads, compiled),
        )
    else:
        contender = _in_bundle(target, variant, threads or len(os.sched_getaffinity(0)), option)
    check_push_t(contender.spec)
    return contender


def check_push_t(spec: BundleSpec) -> None:
    """Refuse a policy that does not observe what the Push-T cell offers.

    Raises:
        EvaluationError: it does not.
    """
    if set(spec.observations) != OBSERVATIONS:
        raise EvaluationError(
            f"policy {spec.name!r} observes {', '.join(spec.observations)}; "
            f"the Push-T cell offers {', '.join(sorted(OBSERVATIONS))}"
        )


def _in_bundle(target: str, variant: str | None, threads: int, option: str) -> Contender:
    """Find a bundle's variant; see :func:`find`."""
    bundle = load_bundle(find_bundle(target))
    spec, name = bundle.spec, variant or bundle.spec.default_variant
    found = next((candidate for candidate in spec.variants if candidate.name == name), None)
    if found is None:
        known = ", ".join(candidate.name for candidate in spec.variants)
        raise EvaluationError(f"{option} {name}: bundle {spec.name!r} has no such variant; it has {known}")

    def engine() -> Engine:
        files = {role: bundle.read(name, role) for role in ("encoder", "timestep", "denoiser")}
        return OnnxRuntimeEngine(files, threads=threads, name=name, large_batches=True)

    identity = (bundle.folder.resolve(), name)
    return Contender(spec, name, None, found.weights, identity, threads, engine)


def evaluate(
    target: str,
    variant: str | None,
    seeds: Sequence[int],
    steps: int | None = None,
    threads: int | None = None,
    against: str | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Evaluate a bundle's variant, a checkpoint or a subnet on the given seeds.

    Args:
        target: bundle (folder or name), run folder or checkpoint file.
        variant: of the bundle (None: its default), or subnet of a supernet's checkpoint (None: the largest).
        seeds: legacy start seeds.
        steps: denoising steps; None for the policy's own.
        threads: inference threads; None for every core, and for one in the case of a checkpoint.
        against: another variant or subnet of ``target``, or ``TARGET:VARIANT`` of another policy, evaluated on the same
            seeds and compared in pairs.
        compiled: compile subnets: half a minute each, then several times as fast.

    Returns:
        A JSON-ready record: ``mean``, ``ci95`` (half-width), ``scores``, ``seeds`` and how they were obtained;
        ``weights`` is the SHA-256 of the variant's denoiser, None for a checkpoint; ``subnet`` is the lossless name of
        a supernet's subnet, else None. ``paired`` holds the mean difference ``variant - other`` with its ``ci95``
        (half-width) and the other's ``scores``, None without ``against``.

    Raises:
        UserError: a policy cannot be read or is not a Push-T policy, a name is unknown, or a seed is out of range; all
            before the first episode.
    """
    if not seeds:
        raise EvaluationError("--seeds: expected at least 1")
    if min(seeds) < 0 or max(seeds) > LAST_SEED:
        raise EvaluationError(f"seeds {min(seeds)} to {max(seeds)}: start seeds are 0 to {LAST_SEED}")
    contender = find(target, variant, threads, compiled)
    rival = None if against is None else _rival(contender, target, against, threads, compiled)
    contenders = [contender] if rival is None else [contender, rival]
    _check_steps(steps, contenders)
    if compiled:
        _check_compiled(contenders)
    first = _evaluate(contender, seeds, steps)
    if rival is None:
        return first | {"paired": None}
    other = _evaluate(rival, seeds, steps)
    ours, theirs = (dict(zip(result["seeds"], result["scores"], strict=True)) for result in (first, other))
    difference = paired_difference(ours, theirs)
    paired = {
        "other": other["variant"],
        "mean": difference.estimate,
        "ci95": difference.half_width,
        **{f"other_{key}": other[key] for key in ("policy", "subnet", "mean", "ci95", "scores", "weights")},
        **{f"other_{key}": other[key] for key in ("sampler", "denoising_steps", "threads")},
    }
    return first | {"paired": paired}


def _rival(contender: Contender, target: str, against: str, threads: int | None, compiled: bool) -> Contender:
    """Find what ``against`` names: ``VARIANT`` of ``target``, or ``TARGET:VARIANT``."""
    elsewhere, separator, name = against.rpartition(":")
    if separator and not (elsewhere and name):
        raise EvaluationError(f"--against {against}: expected a variant or subnet, or TARGET:VARIANT of another policy")
    try:
        rival = find(elsewhere or target, name, threads, compiled, "--against")
    except BundleNotFoundError as error:
        raise EvaluationError(f"--against {against}: {error}") from error
    if rival.identity == contender.identity:
        raise EvaluationError(
            f"--against {against}: expected another variant of {contender.spec.name!r}, got the evaluated one"
        )
    return rival


def _check_steps(steps: int | None, contenders: Sequence[Contender]) -> None:
    for contender in contenders:
        most = contender.spec.diffusion.most_steps
        if steps is not None and not 1 <= steps <= most:
            raise EvaluationError(f"--steps {steps}: policy {contender.spec.name!r} takes 1 to {most} denoising steps")


def _check_compiled(contenders: Sequence[Contender]) -> None:
    """Refuse to compile what cannot be compiled.

    Raises:
        EvaluationError: no subnet is among the contenders.
        CompilerError: there is no C++ compiler.
    """
    if all(contender.subnet is None for contender in contenders):
        raise EvaluationError("--compile: only subnets of a supernet's checkpoint are compiled; leave it out")
    from training.compiling import check_compiler

    check_compiler()


def _evaluate(contender: Contender, seeds: Sequence[int], steps: int | None) -> dict[str, Any]:
    """Evaluate one network; see :func:`evaluate`."""
    started, spec = time.monotonic(), contender.spec
    history = next(iter(spec.observations.values())).history
    with contender.open() as policy:
        result = roll_out(policy, seeds, history, steps)
    interval = mean_interval(result.scores)
    return {
        "policy": spec.name,
        "variant": contender.variant,
        "subnet": contender.subnet,
        "weights": contender.weights,
        "metric": "mean over seeds of max over time of clip(coverage / 0.95, 0, 1)",
        "mean": interval.estimate,
        "ci95": interval.half_width,
        "first_seed": min(seeds),
        "seeds": list(result.seeds),
        "scores": list(result.scores),
        "episode_steps": list(result.steps),
        "denoising_steps": steps or spec.diffusion.steps,
        "sampler": spec.diffusion.sampler,
        "threads": contender.threads,
        "seconds": round(time.monotonic() - started, 2),
    }
