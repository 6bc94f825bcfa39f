"""A group of Push-T worlds that one network drives: one batched policy call per chunk, everything recorded.

What a group does is a pure function of its job and of the weights: no random number is drawn here but the noise of
(seed, call). So it does not matter which process, or machine, runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcqfa_ros.bundle.schema import BundleSpec, DiffusionSpec
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.noise import chunk_noise
from dcqfa_ros.runtime.observations import ObservationLayout
from dcqfa_ros.sim.pusht import PushTWorld
from dcqfa_ros.sim.tee import block_pose, state_to_reset_to
from training.denoising import SamplerUpdate
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.subnet import Subnet

Float = NDArray[np.float32]


class RolloutError(UserError):
    """States that cannot be collected; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What a process needs to run groups; sent to it once. Arrays are NumPy's, so that any process can read them.

    Attributes:
        policy: architecture.
        spec: the policy's specification.
        denoising_steps: per policy call.
        teacher: parameters of the full-precision teacher by name; None where none is asked.
        bf16: run the teacher in BF16, as training does. The student runs its integer codes as evaluation does.
    """

    policy: DiffusionPolicyTConfig
    spec: BundleSpec
    denoising_steps: int
    teacher: Mapping[str, NDArray[Any]] | None
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One group's part of a round: C policy calls in each of N worlds.

    Attributes:
        subnet: the network that drives it.
        starts: (C, N, To, Do) float32, normalised observations of demonstrations: where a world starts that starts
            anew at that call.
        horizon: calls between two starts.
        closed: False shows ``starts`` instead of stepping worlds; then every call is of a new demonstration state.
        seeds: (N,) of the worlds' noise.
        first_call: number of the first call, for the noise.
        teacher_acts: (C, N) bool, whether the teacher's action is executed.
        teacher_asked: (C, N) bool, whether the teacher's action is recorded; where it acts it is in any case.
    """

    subnet: Subnet
    starts: Float
    horizon: int
    closed: bool
    seeds: tuple[int, ...]
    first_call: int
    teacher_acts: NDArray[np.bool_]
    teacher_asked: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Visited:
    """States that were visited, M of them, in the order of calls and then of worlds; normalised, float32.

    Attributes:
        observation: (M, To, Do).
        path: (M, S, T, Da), the network's own sample before each denoising step; T tokens are what is executed.
        teacher: (M, T, Da), the teacher's actions; 0 where they are not known.
        known: (M,) bool, whether they are.
        teacher_calls: chunks that the teacher was asked for.
        restarts: worlds that started anew before their horizon because the task was done.
    """

    observation: Float
    path: Float
    teacher: Float
    known: NDArray[np.bool_]
    teacher_calls: int
    restarts: int

    def __len__(self) -> int:
        """Number of states."""
        return len(self.known)

    @staticmethod
    def join(parts: list[Visited]) -> Visited:
        """All states of several groups, in their order."""
        values: dict[str, Any] = {}
        for field in fields(Visited):
            found = [getattr(part, field.name) for part in parts]
            values[field.name] = np.concatenate(found) if isinstance(found[0], np.ndarray) else sum(found)
        return Visited(**values)


class PathSampler:
    """DDIM sampling of chunks with a training-side network, whose path is kept."""

    def __init__(
        self, network: DiffusionPolicyT, diffusion: DiffusionSpec, steps: int, tokens: int, *, bf16: bool = False
    ) -> None:
        """Prepare ``steps`` denoising steps of the first ``tokens`` action tokens.

        Raises:
            RolloutError: the policy's sampler is not DDIM, whose path depends on nothing but its start.
        """
        if diffusion.sampler != "ddim":
            raise RolloutError(f"diffusion.sampler: rollouts are recorded with ddim, got {diffusion.sampler}")
        self._network, self._tokens, self._bf16 = network.eval(), tokens, bf16
        self._update = SamplerUpdate(diffusion, steps)
        self.timesteps = self._update.timesteps
        with torch.inference_mode(), self._arithmetic():
            self._time = network.timestep_keys_values(torch.from_numpy(self.timesteps))

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._bf16)

    @torch.inference_mode()
    def chunks(self, observation: Float, noise: Float) -> tuple[Float, Float]:
        """Denoise normalised action chunks.

        Args:
            observation: (B, To, Do), normalised.
            noise: (B, horizon, Da), standard normal.

        Returns:
            The chunks' first tokens (B, T, Da), and the samples before every step (B, S, T, Da).
        """
        x = torch.from_numpy(noise)[:, : self._tokens]
        path: list[Tensor] = []
        with self._arithmetic():
            memory = self._network.observation_keys_values(torch.from_numpy(observation))
            for index in range(len(self.timesteps)):
                path.append(x)
                predicted = self._network.denoise(x, self._time[index : index + 1], memory).float()
                x = self._update(x, predicted, index)
        return x.numpy(), torch.stack(path, dim=1).numpy()


def flat_state(network: torch.nn.Module) -> Float:
    """All parameters and buffers of ``network`` behind each other, (P,) float32."""
    return torch.cat([value.detach().float().flatten().cpu() for value in network.state_dict().values()]).numpy()


def load_flat_state(network: torch.nn.Module, flat: Float) -> None:
    """Copy :func:`flat_state` into a network of the same shapes."""
    state = network.state_dict()
    parts = torch.from_numpy(flat).split([value.numel() for value in state.values()])
    with torch.no_grad():
        for value, part in zip(state.values(), parts, strict=True):
            value.copy_(part.view(value.shape))


class GroupRunner:
    """Runs groups with the weights it was last given.

    Attributes:
        timesteps: of the recorded paths, (S,) int64.
    """

    def __init__(self, kit: Kit) -> None:
        """Build student and teacher.

        Raises:
            RolloutError: the policy is none of Push-T key points, or its sampler is not DDIM.
        """
        self._kit, spec = kit, kit.spec
        layout = ObservationLayout(spec)
        self._keys = layout.keys
        if {key.name for key in self._keys} != {"keypoints", "agent_position"}:
            raise RolloutError(
                f"policy {spec.name!r} observes {', '.join(key.name for key in self._keys)}; rollouts offer keypoints "
                "and agent_position of the Push-T cell"
            )
        self._first, self._executed = spec.action.first_executed, spec.action.executed
        self._tokens = self._first + self._executed
        scale, offset = spec.action.normalizer.scale, spec.action.normalizer.offset
        self._action_scale = np.asarray(scale or (1.0,), np.float64)
        self._action_offset = np.asarray(offset or (0.0,), np.float64)
        self.timesteps = SamplerUpdate(spec.diffusion, kit.denoising_steps).timesteps
        self._teacher: PathSampler | None = None
        if kit.teacher is not None:
            teacher = DiffusionPolicyT(kit.policy)
            teacher.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in kit.teacher.items()})
            self._teacher = self._sampler(teacher.requires_grad_(False), kit.bf16)
        self._supernet = ElasticDiffusionPolicyT(kit.policy).requires_grad_(False).eval()
        self._student: tuple[Subnet, PathSampler] | None = None  # the one that ran last
        self._worlds: list[PushTWorld] = []

    def _sampler(self, network: DiffusionPolicyT, bf16: bool) -> PathSampler:
        return PathSampler(network, self._kit.spec.diffusion, self._kit.denoising_steps, self._tokens, bf16=bf16)

    def load(self, weights: Float) -> None:
        """Take the weights (P,) of the supernet; see :func:`flat_state`."""
        load_flat_state(self._supernet, weights)
        self._student = None

    def _driver(self, subnet: Subnet) -> PathSampler:
        if self._student is None or self._student[0] != subnet:
            alone = self._supernet.extract(subnet)
            alone.freeze()
            self._student = subnet, self._sampler(alone, bf16=False)
        return self._student[1]

    def run(self, job: Job) -> Visited:
        """Run a group and return what it visited.

        Raises:
            RolloutError: a policy call gave values that are not finite, or a teacher is asked where there is none.
        """
        student = self._driver(job.subnet)
        calls, count = job.teacher_acts.shape
        while job.closed and len(self._worlds) < count:
            self._worlds.append(PushTWorld())
        observation = np.array(job.starts[0])  # (N, To, Do), normalised
        left = np.zeros(count, np.int64)  # calls until a world starts anew
        seen, paths, answers, restarts = [], [], [], 0
        known = job.teacher_asked | job.teacher_acts
        horizon = (self._kit.spec.action.horizon, self._kit.spec.action.dim)
        for call in range(calls):
            for n in range(count):
                over = left[n] == 0
                if not over and self._worlds[n].done:
                    over, restarts = True, restarts + 1
                if over:
                    observation[n] = self._start(n, job.starts[call, n], job.closed)
                    left[n] = job.horizon if job.closed else 1
            noise = np.stack([chunk_noise(seed, job.first_call + call, horizon) for seed in job.seeds])
            chunk, path = student.chunks(observation, noise)
            answer, rows = np.zeros_like(chunk), np.flatnonzero(known[call])
            if len(rows):
                if self._teacher is None:
                    raise RolloutError("a rollout asks a teacher, but was given none")
                answer[rows] = self._teacher.chunks(observation[rows], noise[rows])[0]
            if not (np.isfinite(chunk).all() and np.isfinite(answer).all()):
                raise RolloutError(f"policy call {call} of a rollout gave actions that are not finite: it diverged")
            seen.append(observation.copy())
            paths.append(path)
            answers.append(answer)
            left -= 1
            executed = np.where(job.teacher_acts[call][:, None, None], answer, chunk)[:, self._first :]
            if job.closed:
                for n in np.flatnonzero(left).tolist():  # what starts anew next need not be stepped
                    observation[n] = self._step(n, observation[n], executed[n])
        return Visited(
            observation=np.concatenate(seen),
            path=np.concatenate(paths),
            teacher=np.concatenate(answers),
            known=known.flatten(),
            teacher_calls=int(known.sum()),
            restarts=restarts,
        )

    # Worlds ----------------------------------------------------------------------------------------------------------

    def _start(self, n: int, start: Float, closed: bool) -> Float:
        """Put world ``n`` where a demonstration was, and return its observation (To, Do)."""
        if not closed:
            return start
        raw = self._raw(start[-1])
        pose = block_pose(raw["keypoints"].reshape(9, 2))
        self._worlds[n].reset_to(state_to_reset_to([*raw["agent_position"], *pose]))
        return np.concatenate([start[:-1], self._observe(n)[None]])

    def _step(self, n: int, observation: Float, executed: Float) -> Float:
        """Execute normalised actions (executed, Da) in world ``n`` as far as its episode goes; returns (To, Do)."""
        world, past = self._worlds[n], list(observation)
        for action in (executed - self._action_offset) / self._action_scale:
            done = world.step(action.astype(np.float32)).done
            past.append(self._observe(n))
            if done:
                break
        return np.stack(past[-len(observation) :])

    def _observe(self, n: int) -> Float:
        """Normalised observation (Do,) of world ``n``."""
        found = self._worlds[n].observation()
        return np.concatenate([key.normalizer.normalize(found[key.name]).ravel() for key in self._keys])

    def _raw(self, observation: Float) -> dict[str, Float]:
        """Raw values by key of a normalised observation (Do,)."""
        values, first = {}, 0
        for key in self._keys:
            part = observation[first : first + key.size].reshape(key.shape)
            values[key.name] = key.normalizer.denormalize(part)
            first += key.size
        return values
