"""What a baseline's report says of its network: bits, what is excluded, sizes, what a device would execute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from training.baselines.bits import FLOAT, Bits
from training.baselines.calibration import Calibration
from training.baselines.network import EXCLUDED, PlainLinear, plain_linears
from training.baselines.parts import BlockHadamard, Multiply, PerTensor, PerToken, Unquantized
from training.policies.diffusion_policy_t import DiffusionPolicyT

MIB = 2**20
FIXED_PAPER_BITS = 8  # of what is excluded, by the paper's convention: never below 8
FLOAT_BYTES = 4


def finish(network: DiffusionPolicyT) -> None:
    """Round what is left in 16 bits to float16, so that an artifact stores just what runs."""
    for linear in plain_linears(network).values():
        rows = linear.row_bits == FLOAT
        linear.codes[rows] = linear.codes[rows].to(torch.float16).to(torch.float32)


def paper_bits(network: DiffusionPolicyT) -> float:
    """Bits of all parameters by the paper's convention (parameters x bits, no scales).

    A linear's weights and biases count at the bits of their rows, the norms of a block at the mean of its linears,
    everything outside the blocks at 8: for equal bits everywhere that is :func:`training.space_counts.paper_bytes`.
    """
    total = 0.0
    inside = 0
    for block in network.decoder_blocks():
        linears = list(plain_linears(block).values())
        weights = sum(linear.codes.numel() for linear in linears)
        bits = sum(float(linear.row_bits.sum()) * linear.in_features for linear in linears)
        total += bits + sum(float(linear.row_bits.sum()) for linear in linears)
        norms = sum(p.numel() for p in block.parameters())
        total += norms * bits / weights
        inside += norms
    outside = sum(p.numel() for p in network.parameters()) - inside
    return total + FIXED_PAPER_BITS * outside


def packed_bytes(network: DiffusionPolicyT) -> int:
    """Bytes of packed parameters: codes row by row, a float32 scale per quantized row, everything else in float32.

    Equal to :func:`training.space_counts.real_bytes` for equal bits without transforms; transforms add their factors.
    """
    total = FLOAT_BYTES * sum(p.numel() for p in network.parameters())
    for linear in plain_linears(network).values():
        for bits in linear.row_bits.tolist():
            total += -(-bits * linear.in_features // 8) + FLOAT_BYTES  # weights and bias
            total += FLOAT_BYTES if 0 < bits < FLOAT else 0
    return total + sum(FLOAT_BYTES * features for features in multiplications(network).values())


def multiplications(network: nn.Module) -> dict[str, int]:
    """Explicit multiplications by input, with the channels of each; equal factors on one tensor are one."""
    found: dict[str, int] = {}
    seen: set[tuple[float, ...]] = set()
    for name, linear in plain_linears(network).items():
        for transform in linear.transforms:
            if isinstance(transform, Multiply):
                key = tuple(transform.factor.tolist())
                if key not in seen:
                    seen.add(key)
                    found[name] = transform.factor.numel()
    return found


def mean_bits(network: nn.Module) -> float:
    """Weight bits averaged over the weights of the plain linears."""
    linears = list(plain_linears(network).values())
    weights = sum(linear.codes.numel() for linear in linears)
    return sum(float(linear.row_bits.sum()) * linear.in_features for linear in linears) / weights


def executes_as(network: nn.Module) -> str:
    """What the network would execute as on a device, in one sentence."""
    linears = list(plain_linears(network).values())
    parts = []
    low = any(bits < 8 for linear in linears for bits in linear.row_bits.unique().tolist())
    activations = {type(linear.activation) for linear in linears}
    if activations == {Unquantized}:
        parts.append(
            "a weight-only network: codes are stored and converted to FP16 before floating-point products, so only "
            "memory and bandwidth are saved"
        )
    elif any(linear.fp8 for linear in linears):
        parts.append(
            "FP8 (E4M3) products with static per-tensor scales on GPUs of compute capability 8.9 and later; CPUs and "
            "Orin have none and execute it as FP16"
        )
    else:
        low = low or any(getattr(linear.activation, "bits", FLOAT) < 8 for linear in linears)
        parts.append(
            "INT8 products"
            + (
                " (4-bit codes too: CPUs and Orin multiply no INT4 activations, so they save storage alone)"
                if low
                else ""
            )
        )
    if PerToken in activations:
        parts.append("activation scales per token, computed at run time (dynamic quantization before every product)")
    elif activations != {Unquantized} and not any(linear.fp8 for linear in linears):
        shifted = any(isinstance(a, PerTensor) and float(a.offset) for a in (linear.activation for linear in linears))
        zero = " and zero points, whose fractional shift goes into the bias" if shifted else ""
        parts.append(f"static activation scales{zero}")
    count = len(multiplications(network))
    if count:
        parts.append(f"{count} explicit multiplications of activations that fold into nothing")
    rotated = sum(any(isinstance(t, BlockHadamard) for t in linear.transforms) for linear in linears)
    if rotated:
        parts.append("an online block Hadamard transform of every quantized linear's input, in floating point")
    if any((linear.row_bits == 0).any() or len(linear.row_bits.unique()) > 1 for linear in linears):
        parts.append("channels of different bits within a layer, each executed at the widest unless they are regrouped")
    return "; ".join(parts) + "."


def report(
    method: str,
    label: str,
    bits: Bits,
    network: DiffusionPolicyT,
    calibration: Calibration | None,
    seconds: float,
    policy_calls: int,
    **others: Any,
) -> dict[str, Any]:
    """The report of a finished network.

    Args:
        method: name in the registry.
        label: what tables call it.
        bits: as asked for.
        network: the finished network.
        calibration: what it was calibrated on; None where it was not.
        seconds: of quantizing, without the shared calibration.
        policy_calls: forward passes of one observation each, calibration included.
        others: of the method alone.
    """
    linears = plain_linears(network)
    return {
        "method": method,
        "label": label,
        "bits": str(bits),
        "weight_bits": {name: _row_bits(linear) for name, linear in linears.items()},
        "activations": {name: linear.activation.spec() for name, linear in linears.items()},
        "mean_weight_bits": mean_bits(network),
        "excluded": list(EXCLUDED),
        "size_paper_mib": paper_bits(network) / 8 / MIB,
        "size_packed_mib": packed_bytes(network) / MIB,
        "executes_as": executes_as(network),
        "calibration_observations": 0 if calibration is None else len(calibration.observation),
        "calibration_steps": 0 if calibration is None else len(calibration.calls),
        "seconds": round(seconds, 2),
        "policy_calls": policy_calls,
        **others,
    }


def calls_of(calibration: Calibration, passes: int = 1) -> int:
    """Forward passes of one observation each in ``passes`` passes over the calibration."""
    return passes * len(calibration.calls) * len(calibration.observation)


def _row_bits(linear: PlainLinear) -> int | dict[str, int]:
    """Bits of all rows, or how many rows have which."""
    values, counts = linear.row_bits.unique(return_counts=True)
    if len(values) == 1:
        return int(values[0])
    return {str(int(value)): int(count) for value, count in zip(values, counts, strict=True)}
