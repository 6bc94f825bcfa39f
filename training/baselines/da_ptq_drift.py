"""DA-PTQ allocation: which layers drift the executed trajectory most (``algorithms.md`` section 7).

``L_drift = E sum_j s_j (e^_j - e_j)^2`` over the executed actions e in their own units, quantized and not. s_j weighs
action dimension j by what it costs to undo an error of the end-effector there; without a kinematic chain s_j = 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from training.baselines.allocation import AllocationError
from training.baselines.allocation_chunks import CalibrationSampler
from training.baselines.bits import Bits
from training.baselines.calibration import Calibration
from training.baselines.network import linear_names, weight_codes
from training.baselines.parts import Part
from training.baselines.rtn import activation_quantizer
from training.trained import TrainedPolicy

Floats = NDArray[np.float64]

TRANSLATION, ROTATION = 1.8, 0.15  # weights of the components of the end-effector's pose
DAMPING = 3e-4
TOGETHER = 16  # chunks with gradients at a time


def dimension_weights(
    jacobians: ArrayLike, *, translation: float = TRANSLATION, rotation: float = ROTATION, damping: float = DAMPING
) -> Floats:
    """Weights (D,) of action dimensions, mean 1: ``s_j = E sum_c w_c |J+_jc|``.

    ``J+ = J^T (J J^T + damping I)^-1``: the damping is added to the squared singular values, so a direction in which
    the arm can hardly move has an inverse of at most ``1 / (2 sqrt(damping))``, 29 in the units of the Jacobian.

    Args:
        jacobians: (N, 6, D) of the end-effector's pose (x, y, z, then rotations) by the action dimensions, along the
            chain, at the configurations that the calibration visits.
        translation: w_c of x, y and z.
        rotation: w_c of the rotations.
        damping: of the pseudo-inverse.

    Raises:
        AllocationError: Jacobians of another shape, not finite or zero, or options out of range.
    """
    matrices = np.asarray(jacobians, np.float64)
    if matrices.ndim != 3 or matrices.shape[1] != 6 or 0 in matrices.shape or not np.isfinite(matrices).all():
        raise AllocationError(f"jacobians: expected finite values (N, 6, action dimensions), got {matrices.shape}")
    if damping <= 0 or translation < 0 or rotation < 0:
        raise AllocationError(
            f"damping {damping}, translation {translation}, rotation {rotation}: expected damping above 0, weights >= 0"
        )
    system = matrices @ matrices.swapaxes(1, 2) + damping * np.eye(6)
    inverse = np.linalg.solve(system, matrices)  # (N, 6, D): the transpose of J+, whose system is symmetric
    component = np.repeat([translation, rotation], 3)
    weights: Floats = np.einsum("c,ncd->d", component, np.abs(inverse)) / len(matrices)
    if not weights.any():
        raise AllocationError("jacobians: no action dimension moves the end-effector; expected at least one")
    return weights / weights.mean()


def read_jacobians(path: str | Path) -> Floats:
    """Jacobians of :func:`dimension_weights` from an ``.npy`` file.

    Raises:
        AllocationError: the file is missing or holds no array of numbers.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise AllocationError(
            f"jacobians: {path}: expected an .npy file of numbers (N, 6, action dimensions) ({error})"
        ) from error


def drift_gradients(
    policy: TrainedPolicy,
    calibration: Calibration,
    bits: Bits,
    weights: ArrayLike,
    *,
    together: int = TOGETHER,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Mean over a layer's weights of ``|dL_drift / dW|``, by module path.

    All layers are quantized to ``bits`` then, weights rounded to nearest and inputs per token: at full precision the
    drift is 0 and so is its gradient. Rounding of inputs passes gradients straight through.

    Args:
        policy: the full-precision policy; it is left as it is.
        calibration: all of its observations are used.
        bits: of the layers that are not kept.
        weights: (Da,) of the action dimensions.
        together: chunks at a time.
        progress: called with the number of chunks after each part.

    Raises:
        AllocationError: weights of another length.
    """
    scale = policy.meaning.action_norm.scale
    width = policy.config.policy.action_dim
    dimension = np.asarray(weights, np.float64)
    if dimension.shape != (width,) or not np.isfinite(dimension).all() or (dimension < 0).any():
        raise AllocationError(f"weights: expected {width} of action dimensions, at least 0, got {dimension.shape}")
    units = np.broadcast_to(np.reciprocal(np.asarray(scale or 1.0, np.float64)), (width,))
    importance = torch.from_numpy((dimension * units**2).astype(np.float32))
    sampler = CalibrationSampler(policy, calibration)
    network, names = copy.deepcopy(policy.network), linear_names(policy.network)
    linears = {name: _low_bit(network.get_submodule(name), bits) for name in names}
    count = len(calibration.observation)
    for rows in torch.arange(count).split(together):
        with torch.enable_grad():
            off = sampler(network, rows) - sampler.reference[rows]
            loss = (off.square() * importance).sum() / (count * off.shape[1])
            loss.backward()
        if progress is not None:
            progress(len(rows))
    return {name: _mean_magnitude(linear.weight.grad) for name, linear in linears.items()}


def _mean_magnitude(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.abs().mean())


def _low_bit(linear: nn.Module, bits: Bits) -> nn.Linear:
    """Quantize a layer in place such that gradients reach its weight and pass its input's rounding."""
    assert isinstance(linear, nn.Linear)
    codes, scale = weight_codes(linear.weight, torch.full((linear.out_features,), bits.weights))
    linear.weight = nn.Parameter(codes * scale[:, None])
    quantizer = activation_quantizer(bits)

    def rounded(_module: nn.Module, arguments: tuple[Tensor, ...], quantizer: Part = quantizer) -> tuple[Tensor, ...]:
        x = arguments[0]
        codes, scale = quantizer(x.detach())
        return (x + (codes * scale - x.detach()),)

    linear.register_forward_pre_hook(rounded)
    return linear
