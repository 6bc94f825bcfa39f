"""What every search of a supernet needs: its networks, the distances known so far, and an executor of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcqfa_ros.runtime.policy import PolicyRuntime
from training.checkpoint_engine import CheckpointVariant, refuse_images
from training.config import TrainConfig
from training.search.cache import DistanceCache
from training.search.distance import Measure
from training.search.executors import Executor
from training.search.teacher_distance import DistanceSource, TeacherDistance
from training.space import SearchSpace
from training.subnet import Subnet
from training.supernet_checkpoint import TrainedSupernet
from training.warm_start import state_sha256


class KnownDistances:
    """Distances from the cache; what it lacks is measured and added, each as soon as it is known.

    Attributes:
        cache: of distances.
        new: how many were measured here.
    """

    def __init__(
        self,
        space: SearchSpace,
        cache: DistanceCache,
        measure: Measure,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Take the cache and what measures.

        Args:
            space: of the supernet.
            cache: known distances; new ones are added.
            measure: of distances.
            progress: called with the number of distances that became known; None for nothing.
        """
        self.cache, self.new = cache, 0
        self._space, self._measure, self._progress = space, measure, progress

    def __call__(self, subnets: Sequence[Subnet]) -> list[float]:
        """Distances of ``subnets``, in order."""
        names = [self._space.name(subnet) for subnet in subnets]
        missing = {name: s for name, s in zip(names, subnets, strict=True) if name not in self.cache}
        for name, value in zip(missing, self._measure(list(missing.values())), strict=True):
            self.cache.add(name, value)
            self.new += 1
            if self._progress is not None:
                self._progress(1)
        return [self.cache[name] for name in names]


@dataclass(frozen=True, slots=True)
class SearchSession:
    """An open search.

    Attributes:
        supernet: the networks.
        cache: known distances.
        measure: of distances.
        workers: processes that measure.
    """

    supernet: TrainedSupernet
    cache: DistanceCache
    measure: Measure
    workers: int


@contextmanager
def search_session(
    supernet: TrainedSupernet, config: TrainConfig, folder: Path, samples: int, executor: Executor
) -> Iterator[SearchSession]:
    """Open data, teacher and known distances of a supernet.

    Args:
        supernet: the networks.
        config: the run's configuration, with the data's place on this machine.
        folder: where distances are kept.
        samples: held-out windows of a distance.
        executor: measures distances.

    Raises:
        UserError: a file is missing or damaged, does not belong to the run, or cannot be written.
    """
    torch.set_num_threads(1)  # as in the processes that measure: figures do not depend on their number
    source = DistanceSource(supernet.path, config, samples)
    distance = TeacherDistance(source, supernet)
    with closing(DistanceCache(folder, distance.key)) as cache, executor.measuring(distance) as (measure, workers):
        yield SearchSession(supernet, cache, measure, workers)


def check_closed_loop(supernet: TrainedSupernet, seeds: range) -> None:
    """Find out before a long search whether its networks can be played.

    Raises:
        UserError: the policy is none of Push-T, or a seed is out of range.
        ModuleNotFoundError: the simulator is not installed.
    """
    from training.evaluate import LAST_SEED, EvaluationError, check_push_t

    refuse_images(supernet.meaning, supernet.path)
    if seeds[-1] > LAST_SEED:
        raise EvaluationError(f"--first-seed: seeds {seeds[0]} to {seeds[-1]}: start seeds are 0 to {LAST_SEED}")
    check_push_t(supernet.meaning.specification())


def closed_loop_scores(
    supernet: TrainedSupernet, names: Sequence[str], seeds: range, folder: Path
) -> list[list[float]]:
    """Scores of every episode of subnets in simulated Push-T, kept in ``folder`` like distances.

    Args:
        supernet: the networks.
        names: of the subnets.
        seeds: start seeds.
        folder: where scores are kept.

    Raises:
        UserError: a score cannot be kept.
    """
    from training.evaluate import roll_out  # the simulator is not needed for distances

    spec = supernet.meaning.specification()
    history = next(iter(spec.observations.values())).history
    key = {"network": state_sha256(supernet.network.state_dict())}
    with closing(DistanceCache(folder, key, "scores")) as known:
        for name in names:
            missing = [seed for seed in seeds if _episode(name, seed) not in known]
            if missing:
                with closing(CheckpointVariant(supernet, name, name).engine(threads=1)) as engine:
                    result = roll_out(PolicyRuntime(spec, engine), missing, history)
                for seed, score in zip(result.seeds, result.scores, strict=True):
                    known.add(_episode(name, seed), score)
        return [[known[_episode(name, seed)] for seed in seeds] for name in names]


def _episode(name: str, seed: int) -> str:
    return f"{name} {seed}"
