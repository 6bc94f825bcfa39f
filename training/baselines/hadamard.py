"""QuaRot-style rotation (Ashkboos et al. 2024): an online block Hadamard before each linear, (x H)(H^T W^T).

Rotated activations and weights have no outlying channels. The rotation is exact before quantization; then weights and
activations are rounded to nearest. QuaRot absorbs rotations of the residual stream into RMSNorm networks; LayerNorm
subtracts a mean and has a bias, so here every linear rotates its input at run time.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from training.baselines import QuantizedPolicy
from training.baselines.bits import BaselineError, Bits
from training.baselines.calibration import Calibration
from training.baselines.network import plain_copy, plain_linears, quantize_weights
from training.baselines.options import no_options
from training.baselines.parts import BlockHadamard
from training.baselines.report import calls_of, finish, report
from training.baselines.rtn import quantize_activations
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.trained import TrainedPolicy


def largest_block(features: int) -> int:
    """The largest power of two that divides ``features``."""
    return features & -features


def _power_of_two(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and not value & (value - 1)


@torch.no_grad()
def rotate(network: DiffusionPolicyT, block: int | None = None) -> None:
    """Rotate the inputs of all plain linears, and their weights back: the function stays the same.

    Args:
        network: with weights in floating point; changed in place.
        block: channels rotated together, a power of two; the largest that divides each input if None.

    Raises:
        BaselineError: ``block`` is no power of two or does not divide an input; nothing was changed.
    """
    linears = plain_linears(network)
    for name, linear in linears.items():
        if block is not None and not (_power_of_two(block) and linear.in_features % block == 0):
            raise BaselineError(
                f"hadamard: block: expected a power of two that divides the {linear.in_features} inputs of {name}, "
                f"got {block!r}"
            )
    for linear in linears.values():
        transform = BlockHadamard(largest_block(linear.in_features) if block is None else block)
        linear.set_weight(transform(linear.weight))
        linear.transforms.append(transform)


class Hadamard:
    """See the module. Options: ``block`` (channels rotated together; the largest power of two by default)."""

    name = "hadamard"
    trains = False

    def quantize(
        self,
        policy: TrainedPolicy,
        bits: Bits,
        calibration: Calibration,
        *,
        seed: int = 0,  # noqa: ARG002 (of the protocol)
        block: int | None = None,
        **options: Any,
    ) -> QuantizedPolicy:
        """See :class:`training.baselines.Baseline`; ``seed`` has no effect: Sylvester's matrix, no random signs."""
        no_options(self.name, options)
        started = time.monotonic()
        network = plain_copy(policy.network)
        rotate(network, block)
        passes = quantize_activations(network, bits, calibration)
        quantize_weights(network, bits)
        finish(network)
        used = calibration if passes else None
        seconds, calls = time.monotonic() - started, calls_of(calibration, passes)
        transforms = (transform for linear in plain_linears(network).values() for transform in linear.transforms)
        blocks = sorted({transform.block for transform in transforms if isinstance(transform, BlockHadamard)})
        return QuantizedPolicy(
            network, report(self.name, "Block Hadamard + RTN", bits, network, used, seconds, calls, blocks=blocks)
        )
