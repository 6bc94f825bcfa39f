"""Loss on windows that training does not see, on draws that are the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from training.data.policy_data import Batch, PolicyData
from training.data.sequences import WindowSet
from training.objective import Objective
from training.world import World

VALIDATION_SEED = 20_000_003  # fixed windows, noise and time steps
BATCHES = 4
BATCH = 256


@torch.no_grad()
def held_out_loss(
    network: Callable[..., Tensor],
    objective: Objective,
    data: PolicyData,
    *,
    windows: WindowSet | None = None,
    prefix: int | None = None,
    loss: Callable[[Callable[..., Tensor], Batch], Tensor] | None = None,
    batches: int = BATCHES,
    size: int = BATCH,
    world: World | None = None,
) -> float:
    """Mean loss of a network; NaN when there are no windows.

    Args:
        network: maps noisy actions (B, H, Da), time steps (B,) and observations (B, To, Do) to noise (B, H, Da).
        objective: the forward process, on the device of ``network``.
        data: where windows are drawn.
        windows: drawn from; the held-out ones of ``data`` if None.
        prefix: number of leading action tokens that are known in every window; None for drawn ones.
        loss: of the network in one draw; the denoising loss of ``objective`` if None.
        batches: number of draws.
        size: windows per draw.
        world: processes that share every draw; None for this one alone.
    """
    windows = data.held_out if windows is None else windows
    if not len(windows):
        return float("nan")
    losses = []
    for index in range(batches):
        drawn = data.draw(windows, VALIDATION_SEED + index, size)
        if prefix is not None:
            drawn = replace(drawn, prefix=torch.full((size,), prefix))
        batch = (drawn if world is None else world.share(drawn)).to(objective.device)
        losses.append((loss or objective.loss)(network, batch).item())
    return float(np.mean(losses if world is None else world.mean(losses)))
