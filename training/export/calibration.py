"""Post-training W8A8 quantization of a trained policy, calibrated on its own training episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.runtime.denoising import DenoisingLoop
from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.guidance import Guidance
from dcqfa_ros.runtime.noise import chunk_noise, step_noise
from training.data.episodes import DataError, Demonstrations, split_episodes
from training.data.normalizer import concatenate_normalizers, normalize
from training.data.sequences import window_rows
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import input_groups
from training.quant.calibrate import observed_inputs, quantized_copy
from training.quant.linear import LinearBits
from training.specification import PolicyMeaning
from training.torch_engine import TorchEngine

Float = NDArray[np.float32]
CHUNK_SEED = 7_000_001  # seeds the noise of calibration and parity chunks; no evaluation uses it
BATCH = 64


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """Leading action tokens that chunks are denoised with: normalised actions (N, H, Da), lengths (N,) int64."""

    action: Float
    length: NDArray[np.int64]

    def guidance(self, rows: range) -> Guidance:
        """What the denoising loop reads, of some rows."""
        action, length = self.action[rows.start : rows.stop], self.length[rows.start : rows.stop]
        clean = (np.arange(action.shape[1]) < length[:, None])[..., None]
        nothing = np.zeros(clean.shape, np.float32)
        return Guidance(np.where(clean, action, 0.0).astype(np.float32), nothing, nothing, clean)


def training_observations(meaning: PolicyMeaning, demonstrations: Demonstrations, count: int, seed: int) -> Float:
    """Normalised observations (count, To, Do), float32, drawn without replacement from the training episodes.

    Raises:
        DataError: the training episodes hold fewer observations.
    """
    rows = _rows(meaning, demonstrations, count, seed)[:, : meaning.config.policy.observation_horizon]
    norm = concatenate_normalizers(dict(meaning.observation_norms), meaning.shapes)
    return normalize(demonstrations.observation, norm)[rows]


def known_tokens(meaning: PolicyMeaning, demonstrations: Demonstrations, count: int, seed: int) -> KnownTokens | None:
    """Demonstrated actions to the observations of :func:`training_observations`, known up to lengths drawn uniformly.

    None where the policy takes no known tokens.

    Raises:
        DataError: as :func:`training_observations`.
    """
    longest = meaning.config.policy.prefix
    if not longest:
        return None
    rows = _rows(meaning, demonstrations, count, seed)
    lengths = np.random.default_rng([seed, longest]).integers(longest + 1, size=count)
    return KnownTokens(normalize(demonstrations.action, meaning.action_norm)[rows], lengths)


def _rows(meaning: PolicyMeaning, demonstrations: Demonstrations, count: int, seed: int) -> NDArray[np.int64]:
    """Rows (count, H) of windows that begin with a drawn observation's history."""
    data, policy = meaning.config.data, meaning.config.policy
    train, _ = split_episodes(demonstrations.episodes, data.validation_ratio, data.split_seed, data.max_train_episodes)
    history = policy.observation_horizon
    rows = window_rows(demonstrations, train, policy.horizon, history - 1, policy.horizon - history)
    if len(rows) < count:
        raise DataError(f"{data.path}: {count} observations are asked for, the training episodes hold {len(rows)}")
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), size=count, replace=False))]


def denoise_chunks(
    engine: Engine,
    diffusion: DiffusionSpec,
    policy: DiffusionPolicyTConfig,
    observations: Float,
    progress: Callable[[int], object] | None = None,
    known: KnownTokens | None = None,
) -> Float:
    """Whole normalised chunks (N, horizon, Da) of normalised observations (N, To, Do), noise seeded by row number.

    ``known`` holds leading tokens of them that are not denoised, for a policy that takes any.
    """
    shape = (policy.horizon, policy.action_dim)
    chunks = []
    for first in range(0, len(observations), BATCH):
        part = observations[first : first + BATCH]
        rows = range(first, first + len(part))

        def ancestral_noise(index: int, rows: range = rows) -> Float:
            return np.stack([step_noise(CHUNK_SEED, row, index, shape) for row in rows])

        loop = DenoisingLoop(diffusion, *shape, batch=len(part))
        chunk = loop.run(
            engine,
            np.stack([chunk_noise(CHUNK_SEED, row, shape) for row in rows]),
            engine.timestep_kv(loop.timesteps),
            engine.observation_kv(part),
            ancestral_noise,
            None if known is None else known.guidance(rows),
        )
        chunks.append(chunk.copy())
        if progress is not None:
            progress(len(part))
    return np.concatenate(chunks)


def quantize_policy(
    network: DiffusionPolicyT,
    diffusion: DiffusionSpec,
    observations: Float,
    threads: int,
    progress: Callable[[int], object] | None = None,
    known: KnownTokens | None = None,
) -> DiffusionPolicyT:
    """W8A8 copy of ``network``; activation scales from whole denoising runs on ``observations`` (N, To, Do).

    Where the policy takes known tokens, ``known`` says which: activations differ between known and noisy ones.
    The time tokens of every training time step are observed too, so that any number of denoising steps is covered.
    """
    groups = input_groups(network)
    engine = TorchEngine(network, threads)
    with observed_inputs(network, groups) as statistics:
        denoise_chunks(engine, diffusion, network.config, observations, progress, known)
        engine.timestep_kv(np.arange(diffusion.train_timesteps))
    return quantized_copy(network, groups, statistics, LinearBits())
