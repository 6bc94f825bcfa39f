"""Noise schedule shared by training and by the denoising loop on the robot.

Definitions: Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (squared cosine), Song et al. 2021 (DDIM), Song et al. 2023
(consistency models) with the boundary condition of Luo et al. 2023 (latent consistency models).
The numbers agree with ``diffusers``' ``DDPMScheduler`` and ``DDIMScheduler`` (tests hold them together to 1e-5).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]

MAX_BETA = 0.999  # keeps the last step's signal above zero
BOUNDARY_SCALE, BOUNDARY_SIGMA = 10.0, 0.5  # of the boundary condition: how fast it fades with the level


def squared_cosine_betas(train_timesteps: int) -> Float:
    """Return betas, shape (train_timesteps,), float64, of the squared-cosine schedule, capped at 0.999.

    Raises:
        ValueError: ``train_timesteps`` is below 1.
    """
    if train_timesteps < 1:
        raise ValueError(f"train_timesteps: expected at least 1, got {train_timesteps}")
    t = np.arange(train_timesteps + 1, dtype=np.float64) / train_timesteps
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA), np.float64)


def alphas_cumprod(betas: Float) -> Float:
    """Return the cumulative signal share (alpha bar) per training time step, shape and dtype of ``betas``."""
    return np.asarray(np.cumprod(1.0 - betas), np.float64)


def leading_timesteps(train_timesteps: int, steps: int) -> Int:
    """Return the ``steps`` descending training time steps visited, shape (steps,), int64 ("leading" spacing).

    Raises:
        ValueError: ``steps`` is outside 1..train_timesteps.
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"denoising steps: expected 1 to {train_timesteps}, got {steps}")
    return (np.arange(steps, dtype=np.int64) * (train_timesteps // steps))[::-1].copy()


def consistency_timesteps(levels: int, steps: int) -> Int:
    """Return the ``steps`` descending time steps, shape (steps,), int64, that cut ``levels`` in equal parts.

    The first is the highest level, ``levels - 1``; the last lies one part above the clean sample.

    Raises:
        ValueError: ``steps`` is outside 1..levels.
    """
    if not 1 <= steps <= levels:
        raise ValueError(f"denoising steps: expected 1 to {levels}, got {steps}")
    return -(-levels * np.arange(steps, 0, -1, dtype=np.int64) // steps) - 1


def consistency_boundary(timesteps: Int) -> tuple[Float, Float]:
    """Shares (c_skip, c_out) of sample and predicted clean sample in a consistency function, shapes of ``timesteps``.

    Time step -1 is the clean sample, which the function returns as it is: there they are 1 and 0.
    """
    scaled = (np.asarray(timesteps, np.float64) + 1.0) * BOUNDARY_SCALE
    skip = BOUNDARY_SIGMA**2 / (scaled**2 + BOUNDARY_SIGMA**2)
    return skip, scaled / np.sqrt(scaled**2 + BOUNDARY_SIGMA**2)
