"""Closed-loop evaluation by the published Push-T protocol (``algorithms.md`` section 10).

Worlds start in the legacy state of their seed, run at most 300 steps, and score the maximum over time of
clip(coverage / 0.95, 0, 1). All worlds share one batched policy call per chunk; noise is drawn per (seed, chunk), so
variants are compared in pairs. A bundle is evaluated without PyTorch; only a checkpoint imports it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.errors import UserError
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from dcqfa_ros.runtime.policy import PolicyRuntime
from dcqfa_ros.sim.pusht import EPISODE_STEPS
from dcqfa_ros.trials.statistics import mean_interval, paired_difference
from training.envs.pusht import PushTWorlds

LAST_SEED = 2**32 - 1  # of the legacy generator that draws start states
CHECKPOINT_VARIANT = "checkpoint"


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


@dataclass(frozen=True, slots=True)
class Scores:
    """Score (0..1) and number of executed steps per seed, in seed order."""

    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    steps: tuple[int, ...]


def roll_out(policy: ChunkPolicy, seeds: Sequence[int], history: int, steps: int | None = None) -> Scores:
    """Run one episode per seed, all together, and return their scores.

    Args:
        policy: predicts the executed actions of a chunk for a batch of observations.
        seeds: legacy start seeds.
        history: observations per policy call.
        steps: denoising steps; None for the bundle's own.
    """
    worlds = PushTWorlds(seeds, history)
    states = worlds.reset()
    active = list(range(len(seeds)))
    chunk = 0
    with tqdm(total=len(seeds) * EPISODE_STEPS, desc="eval", unit="step", mininterval=1.0) as bar:
        while active:
            observation = {key: np.stack([states[index].history[key] for index in active]) for key in states[0].history}
            actions = policy.predict(observation, [seeds[i] for i in active], [chunk] * len(active), steps=steps)
            for index, executed in zip(active, actions, strict=True):
                before = states[index].steps
                states[index] = worlds.step(index, executed)
                bar.update((EPISODE_STEPS if states[index].done else states[index].steps) - before)
            active = [index for index in active if not states[index].done]
            bar.set_postfix(score=f"{np.mean([state.score for state in states]):.3f}", active=len(active))
            chunk += 1
    return Scores(tuple(seeds), tuple(state.score for state in states), tuple(state.steps for state in states))


def is_checkpoint(target: str) -> bool:
    """Whether ``target`` is a run folder or a checkpoint file and not a bundle."""
    path = Path(target)
    return path.suffix == ".pt" or (path / "checkpoint.pt").is_file()


@contextmanager
def open_policy(target: str, variant: str | None, threads: int) -> Iterator[tuple[BundleSpec, str, PolicyRuntime]]:
    """Open a bundle's variant, or a run folder or checkpoint file, for in-process inference.

    Yields:
        The policy's specification, the variant's name (``checkpoint`` for a checkpoint) and the runtime.

    Raises:
        UserError: the bundle or checkpoint cannot be read or has no such variant.
    """
    path = Path(target)
    if is_checkpoint(target):
        if variant not in (None, CHECKPOINT_VARIANT):
            raise EvaluationError(f"--variant {variant}: {path} is a checkpoint and has no variants; export it first")
        from training.torch_engine import TorchEngine  # only a checkpoint needs PyTorch
        from training.trained import load_trained

        trained = load_trained(path)
        spec = trained.meaning.specification()
        engine: Any = TorchEngine(trained.network, threads)
        name = CHECKPOINT_VARIANT
    else:
        bundle = load_bundle(find_bundle(target))
        spec, name = bundle.spec, variant or bundle.spec.default_variant
        if name not in {candidate.name for candidate in spec.variants}:
            known = ", ".join(candidate.name for candidate in spec.variants)
            raise EvaluationError(f"--variant {name}: bundle {spec.name!r} has no such variant; it has {known}")
        files = {role: bundle.read(name, role) for role in ("encoder", "timestep", "denoiser")}
        engine = OnnxRuntimeEngine(files, threads=threads, name=name)
    try:
        yield spec, name, PolicyRuntime(spec, engine)
    finally:
        engine.close()


def evaluate(
    target: str,
    variant: str | None,
    seeds: Sequence[int],
    steps: int | None = None,
    threads: int = 1,
    against: str | None = None,
) -> dict[str, Any]:
    """Evaluate a bundle's variant or a checkpoint on the given seeds.

    Args:
        target: bundle (folder or name), run folder or checkpoint file.
        variant: of the bundle; None for its default.
        seeds: legacy start seeds.
        steps: denoising steps; None for the bundle's own.
        threads: inference threads.
        against: another variant of the bundle, evaluated on the same seeds and compared in pairs.

    Returns:
        A JSON-ready record: ``mean``, ``ci95`` (half-width), ``scores``, ``seeds`` and how they were obtained;
        ``weights`` is the SHA-256 of the variant's denoiser, None for a checkpoint. ``paired`` holds the mean
        difference ``variant - other`` with its ``ci95`` (half-width) and the other's ``scores``, None without
        ``against``.

    Raises:
        UserError: the policy cannot be read or is not a Push-T policy, or a seed is out of range.
    """
    if not seeds:
        raise EvaluationError("--seeds: expected at least 1")
    if min(seeds) < 0 or max(seeds) > LAST_SEED:
        raise EvaluationError(f"seeds {min(seeds)} to {max(seeds)}: start seeds are 0 to {LAST_SEED}")
    if against is not None:
        _check_against(target, variant, against)
    first = _evaluate(target, variant, seeds, steps, threads)
    if against is None:
        return first | {"paired": None}
    other = _evaluate(target, against, seeds, steps, threads)
    ours, theirs = (dict(zip(result["seeds"], result["scores"], strict=True)) for result in (first, other))
    difference = paired_difference(ours, theirs)
    paired = {
        "other": against,
        "mean": difference.estimate,
        "ci95": difference.half_width,
        "other_mean": other["mean"],
        "other_scores": other["scores"],
        "other_weights": other["weights"],
    }
    return first | {"paired": paired}


def _check_against(target: str, variant: str | None, against: str) -> None:
    """Find out before the first evaluation whether there is a second one to compare with."""
    if is_checkpoint(target):
        raise EvaluationError(f"--against {against}: {target} is a checkpoint and has no variants; export it first")
    spec = load_bundle(find_bundle(target), verify=False).spec
    known = [candidate.name for candidate in spec.variants]
    if against not in known or against == (variant or spec.default_variant):
        raise EvaluationError(
            f"--against {against}: expected another variant of {spec.name!r}; it has {', '.join(known)}"
        )


def _evaluate(
    target: str, variant: str | None, seeds: Sequence[int], steps: int | None, threads: int
) -> dict[str, Any]:
    """Evaluate one variant or checkpoint; see :func:`evaluate`."""
    started = time.monotonic()
    with open_policy(target, variant, threads) as (spec, name, policy):
        expected = {"keypoints", "agent_position"}
        if set(spec.observations) != expected:
            raise EvaluationError(
                f"bundle {spec.name!r} observes {', '.join(spec.observations)}; "
                f"the Push-T cell offers {', '.join(sorted(expected))}"
            )
        history = next(iter(spec.observations.values())).history
        result = roll_out(policy, seeds, history, steps)
    interval = mean_interval(result.scores)
    return {
        "policy": spec.name,
        "variant": name,
        "weights": next((v.files["denoiser"].sha256 for v in spec.variants if v.name == name), None),
        "metric": "mean over seeds of max over time of clip(coverage / 0.95, 0, 1)",
        "mean": interval.estimate,
        "ci95": interval.half_width,
        "first_seed": min(seeds),
        "seeds": list(result.seeds),
        "scores": list(result.scores),
        "episode_steps": list(result.steps),
        "denoising_steps": steps or spec.diffusion.steps,
        "sampler": spec.diffusion.sampler,
        "threads": threads,
        "seconds": round(time.monotonic() - started, 2),
    }
