"""The optimizer's part of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue with a checkpoint's moments; decays are those of the configuration, which may be others now."""
    own = [{key: group[key] for key in ("betas", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
