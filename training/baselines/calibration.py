"""The calibration that every baseline shares: 256 training observations, pooled over the denoising steps of one chunk.

The full-precision policy denoises a chunk for each observation with its own sampler; what the network read at every
step is kept (:class:`Call`), over the tokens that a robot computes. A method then runs any network on the same calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.noise import chunk_noise, step_noise
from training.baselines.bits import BaselineError
from training.baselines.network import linear_groups, observed
from training.config import TrainConfig, override
from training.data.episodes import DataError
from training.data.policy_data import PolicyData
from training.export.calibration import KnownTokens
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.quant.calibrate import InputGroup
from training.torch_engine import TorchEngine
from training.trained import TrainedPolicy
from training.warm_start import check_normalizers

OBSERVATIONS = 256
CALIBRATION_SEED = 60_000_011  # no training step, evaluation or other calibration draws from it
SAMPLE_ROWS = 2048  # inputs of a linear that are kept as they are

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the network: noisy (N, T, Dn) float32, time steps (N,) int64, observations (N, To, input_dim)."""

    noisy: Tensor
    timesteps: Tensor
    observation: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What methods calibrate on.

    Attributes:
        calls: one per denoising step, the noisiest first; all with the same observations.
        observation: (N, To, input_dim) float32, normalised.
        noise: (N, T, Da) float32, what the chunks were denoised from.
        chunk: (N, T, Da) float32, the full-precision policy's chunks.
        first: leading tokens that are of the past: tokens ``first`` to T are executed.
        data_sha256: of the demonstrations.
        seed: of the draw.
        kept: statistics of the full-precision network, once a method has asked for them.
    """

    calls: tuple[Call, ...]
    observation: Tensor
    noise: Tensor
    chunk: Tensor
    first: int
    data_sha256: str
    seed: int
    kept: dict[str, InputStatistics] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, network: DiffusionPolicyT) -> None:
        """Run a network on every call."""
        for call in self.calls:
            network(call.noisy, call.timesteps, call.observation)


@dataclass(slots=True, eq=False)
class InputStatistics:
    """What is known of the input x (in,) of one group of linears.

    Attributes:
        group: the linears.
        count: tokens seen.
        second_moment: (in, in) float64, sum of x x^T: gives every output error exactly.
        total: (in,) float64, sum of x.
        magnitude: (in,) float64, sum of |x|.
        peak: (in,) float32, greatest |x|.
        minimum, maximum: least and greatest x of all channels.
        rows: (at most SAMPLE_ROWS, in) float32, every so many inputs as they were, over all steps.
    """

    group: InputGroup
    second_moment: Tensor
    total: Tensor
    magnitude: Tensor
    peak: Tensor
    count: int = 0
    minimum: float = 0.0
    maximum: float = 0.0
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, group: InputGroup, features: int) -> InputStatistics:
        """Nothing seen of ``features`` channels."""
        square = torch.zeros(features, features, dtype=torch.float64)
        total, magnitude = torch.zeros(2, features, dtype=torch.float64)
        return cls(group, square, total, magnitude, torch.zeros(features))

    def add(self, x: Tensor, keep: int) -> None:
        """Add inputs (tokens, in) and keep up to ``keep`` of them, evenly spaced."""
        if not x.isfinite().all():
            raise BaselineError(
                f"{self.group.name}: calibration met NaN or infinity; check the checkpoint and the data"
            )
        self.count += len(x)
        self.second_moment += (x.t() @ x).to(torch.float64)
        self.total += x.sum(0).to(torch.float64)
        self.magnitude += x.abs().sum(0).to(torch.float64)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        self.minimum = min(self.minimum, float(x.min()))
        self.maximum = max(self.maximum, float(x.max()))
        self.kept.append(x[torch.linspace(0, len(x) - 1, min(keep, len(x))).long()].clone())

    @property
    def rows(self) -> Tensor:
        """The inputs kept."""
        return torch.cat(self.kept)

    @property
    def mean(self) -> Tensor:
        """(in,) float32, mean of x."""
        return (self.total / self.count).to(torch.float32)

    @property
    def mean_magnitude(self) -> Tensor:
        """(in,) float32, mean of |x|."""
        return (self.magnitude / self.count).to(torch.float32)

    @property
    def gram(self) -> Tensor:
        """(in, in) float32, mean of x x^T: a weight error D (out, in) costs ``D gram D^T`` per output channel."""
        return (self.second_moment / self.count).to(torch.float32)

    def output_error(self, difference: Tensor) -> Tensor:
        """Mean squared error (out,) of the outputs when weights are off by ``difference`` (out, in)."""
        return ((difference @ self.gram) * difference).sum(1).clamp_min(0.0)


def statistics(
    network: DiffusionPolicyT,
    calibration: Calibration,
    groups: Sequence[InputGroup] | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the input of every group of linears, by the group's name, pooled over all calls."""
    groups = linear_groups(network) if groups is None else groups
    found: dict[str, InputStatistics] = {}
    keep = -(-SAMPLE_ROWS // len(calibration.calls))

    def observe(group: InputGroup, x: Tensor) -> None:
        if group.name not in found:
            found[group.name] = InputStatistics.of(group, x.shape[1])
        found[group.name].add(x, keep)

    with observed(network, observe, groups), torch.no_grad():
        for call in tqdm(calibration.calls, desc="calibrate", unit="step", mininterval=2.0, leave=False):
            network(call.noisy, call.timesteps, call.observation)
    return found


def policy_statistics(network: DiffusionPolicyT, calibration: Calibration) -> dict[str, InputStatistics]:
    """:func:`statistics` of the full-precision network that ``calibration`` was made with, collected once.

    Not to be changed: every method reads the same.
    """
    if not calibration.kept:
        calibration.kept.update(statistics(network, calibration))
    return dict(calibration.kept)


def calibration_data(policy: TrainedPolicy, path: str | None = None) -> PolicyData:
    """The demonstrations that ``policy`` was trained on, in single precision.

    Args:
        policy: the full-precision policy.
        path: of the demonstrations; where the run read them if None.

    Raises:
        DataError: they cannot be read, or are not those of the run.
        WarmStartError: they are in other units.
    """
    section = {} if path is None else {"path": path, "format": "auto"}
    config: TrainConfig = override(policy.config, data=section, run={"precision": "fp32"})
    data = PolicyData(config)
    if policy.meaning.data_sha256 not in (None, data.sha256):
        raise DataError(
            f"{config.data.path}: not the demonstrations that {policy.path} was trained on; give those with --data"
        )
    meaning = policy.meaning  # of a bundle the hash may be unknown, its units are not
    check_normalizers(
        policy.path, (meaning.observation_norms, meaning.action_norm), (data.observation_norms, data.action_norm)
    )
    return data


class _Recorder(TorchEngine):
    """Keeps what the denoiser reads."""

    def __init__(self, network: DiffusionPolicyT) -> None:
        super().__init__(network, torch.get_num_threads())
        self.read: list[Float] = []

    def denoise(self, noisy: Float, timestep_kv: Float, observation_kv: Float, out: Float | None = None) -> Float:
        self.read.append(noisy.copy())
        return super().denoise(noisy, timestep_kv, observation_kv, out)


def calibrate(
    policy: TrainedPolicy, data: PolicyData, observations: int = OBSERVATIONS, seed: int = CALIBRATION_SEED
) -> Calibration:
    """Denoise one chunk for each of ``observations`` training windows, drawn without replacement by ``seed``.

    Raises:
        BaselineError: the training episodes hold fewer windows.
    """
    if not 1 <= observations <= len(data.windows):
        raise BaselineError(
            f"calibration observations: expected 1 to the {len(data.windows)} training windows, got {observations}"
        )
    config = policy.config
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.windows), generator=generator)[:observations]
    observation = data.windows.observations(index, generator).contiguous()
    tokens = config.policy.observation_horizon - 1 + config.executed_actions
    shape = (config.policy.horizon, config.policy.action_dim)
    diffusion = policy.meaning.specification().diffusion
    loop = DenoisingLoop(diffusion, tokens, config.policy.action_dim, batch=observations)
    known = None
    if config.policy.prefix:
        lengths = torch.randint(config.policy.prefix + 1, (observations,), generator=generator).numpy()
        known = KnownTokens(data.windows.action[index][:, :tokens].numpy(), lengths).guidance(range(observations))
    noise = np.stack([chunk_noise(seed, row, shape)[:tokens] for row in range(observations)])
    engine = _Recorder(policy.network)
    chunk = loop.run(
        engine,
        noise,
        engine.timestep_kv(loop.timesteps),
        engine.observation_kv(observation.numpy()),
        lambda step: np.stack([step_noise(seed, row, step, shape)[:tokens] for row in range(observations)]),
        known,
    ).copy()
    calls = tuple(
        Call(torch.from_numpy(noisy), torch.full((observations,), int(timestep)), observation)
        for noisy, timestep in zip(engine.read, loop.timesteps, strict=True)
    )
    first = config.policy.observation_horizon - 1
    return Calibration(calls, observation, torch.from_numpy(noise), torch.from_numpy(chunk), first, data.sha256, seed)
