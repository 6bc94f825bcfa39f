"""Distance of a subnet to the full-precision teacher on fixed held-out samples: what a search minimises."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dcqfa_ros.errors import UserError
from training.config import TrainConfig, override
from training.data.policy_data import PolicyData
from training.objective import Objective
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.subnet import Subnet
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.warm_start import policy_beside, read_policy_weights, state_sha256

SAMPLE_SEED = 50_000_017  # fixed windows, noise and time steps: every subnet is measured on the same
SAMPLES = 256
VERSION = 1  # raised when the same weights would give other distances: those that are kept are then measured anew


class DistanceError(UserError):
    """A distance that cannot be measured; the message says what is missing."""


class Measure(Protocol):
    """Measures subnets, in order."""

    def __call__(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        """Distances of ``subnets``, each as soon as it is known."""
        ...


@dataclass(frozen=True, slots=True)
class DistanceSource:
    """Where the networks and samples of a distance come from; small enough to be sent to other processes.

    Attributes:
        checkpoint: file of the supernet.
        config: the run's configuration, with the data's place on this machine.
        samples: windows, with one time step and noise each.
    """

    checkpoint: Path
    config: TrainConfig
    samples: int = SAMPLES


class TeacherDistance:
    """Mean squared difference between the noise that a subnet and the teacher predict, over the executed actions.

    Both run in float32. Attention is causal, so tokens behind the executed ones change nothing and are left out.

    Attributes:
        supernet: the network that subnets are activated in.
        key: what the distances depend on.
    """

    def __init__(self, source: DistanceSource, supernet: TrainedSupernet | None = None) -> None:
        """Read networks and data, draw the samples and run the teacher on them.

        Raises:
            UserError: a file is missing or damaged, or does not belong to the run.
        """
        self.supernet = supernet or load_supernet(source.checkpoint)
        meaning, config = self.supernet.meaning, source.config
        assert config.supernet is not None
        weights = read_policy_weights(policy_beside(source.checkpoint, config.supernet.warm_start), config.policy)
        teacher_sha256 = state_sha256(weights.state)
        if self.supernet.teacher_sha256 not in (None, teacher_sha256):
            raise DistanceError(
                f"{source.checkpoint}: was trained with another teacher than {weights.path}; restore that one "
                "(supernet.warm_start of its configuration)"
            )
        data = PolicyData(override(config, run={"precision": "fp32"}))
        if meaning.data_sha256 not in (None, data.sha256):
            raise DistanceError(
                f"{config.data.path}: not the demonstrations that {source.checkpoint} was trained on; give those with "
                "--data"
            )
        if not len(data.held_out):
            raise DistanceError(
                f"{source.checkpoint}: the run holds no episode out (data.validation_ratio), so no subnet can be judged"
            )
        tokens = config.policy.observation_horizon - 1 + config.executed_actions
        batch = data.draw(data.held_out, SAMPLE_SEED, source.samples)
        noisy = Objective(data.config, torch.device("cpu")).noisy(batch)[:, :tokens]
        self._arguments = (noisy, batch.timesteps, batch.observation)
        teacher = DiffusionPolicyT(config.policy)
        teacher.load_state_dict(weights.state)
        self._first = config.policy.observation_horizon - 1  # actions before it are of the past
        with torch.inference_mode():
            self._target = teacher.eval()(*self._arguments)[:, self._first :]
        self.key: dict[str, Any] = {
            "version": VERSION,
            "network": state_sha256(self.supernet.network.state_dict()),
            "teacher": teacher_sha256,
            "data": data.sha256,
            "samples": source.samples,
            "seed": SAMPLE_SEED,
            "tokens": [self._first, tokens],
        }

    def distance(self, subnet: Subnet) -> float:
        """Distance of one subnet."""
        network = self.supernet.network
        network.activate(subnet)
        with torch.inference_mode():
            predicted = network(*self._arguments)[:, self._first :]
            return float(torch.nn.functional.mse_loss(predicted, self._target))

    def __call__(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        """Distances of ``subnets``, one after the other."""
        return (self.distance(subnet) for subnet in subnets)


@contextmanager
def spread(distance: TeacherDistance, source: DistanceSource, workers: int) -> Iterator[Measure]:
    """A measure on ``workers`` processes of one thread each; this process alone where that is 1.

    Subnets are independent of each other, so the figures are those of one process.

    Raises:
        DistanceError: a process was killed, or found other weights in the checkpoint than this one.
    """
    if workers == 1:
        yield distance
        return
    context = multiprocessing.get_context("spawn")
    arguments = (source, distance.key)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=arguments) as pool:

        def measure(subnets: Sequence[Subnet]) -> Iterator[float]:
            try:
                yield from pool.map(_distance, subnets)
            except BrokenProcessPool as error:
                raise DistanceError(
                    "a process that measures distances ended early (killed, or out of memory); what was measured is "
                    "kept: give the same command again, with fewer --workers if memory is short"
                ) from error

        yield measure


_in_worker: TeacherDistance | UserError | None = None


def _start(source: DistanceSource, key: dict[str, Any]) -> None:
    global _in_worker  # a process pool has no other place for what its processes keep
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        found = TeacherDistance(source)
        if found.key != key:
            raise DistanceError(
                f"{source.checkpoint}: changed while it was searched (a run goes on there?); search a copy"
            )
        _in_worker = found
    except UserError as error:
        _in_worker = error  # raised where it reaches the user: an initializer's errors only break the pool


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _distance(subnet: Subnet) -> float:
    if isinstance(_in_worker, UserError):
        raise _in_worker
    assert _in_worker is not None
    return _in_worker.distance(subnet)
