"""Quantities that depend on the optimizer step alone: learning rate, averaging decay, random seed."""

from __future__ import annotations

import numpy as np


def learning_rate_factor(step: int, warmup: int, total: int, floor: float) -> float:
    """Linear warm-up over ``warmup`` steps, then cosine decay to ``floor`` (a share of the base rate) at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + float(np.cos(np.pi * progress)))


def ema_decay(step: int, power: float, maximum: float) -> float:
    """Decay of the exponential moving average at ``step`` (0 at the first step)."""
    return min(maximum, 1.0 - (1.0 + step) ** -power)


def step_seed(seed: int, step: int) -> int:
    """A well mixed 63-bit seed per (run seed, step)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
