"""What is known of the samples of a step that failed."""

from __future__ import annotations

from torch import Tensor

from training.data.policy_data import PolicyData
from training.schedules import step_seed
from training.world import World

SHOWN = 8  # windows that are named


def culprits(data: PolicyData, world: World, seed: int, step: int, size: int) -> tuple[str, bool]:
    """Which windows a step drew, or which of them are not finite, as a sentence; and whether there are any such.

    Every process has to ask, and all get the same answer.

    Args:
        data: where the windows come from.
        world: the processes that share the draw; memory of one alone may be damaged.
        seed: ``run.seed``.
        step: the step.
        size: windows it drew.
    """
    batch = data.draw(data.windows, step_seed(seed, step), size)
    finite = [part.isfinite().flatten(1).all(1) for part in (batch.observation, batch.action)]
    bad = [share < 1.0 for share in world.mean((finite[0] & finite[1]).double().tolist())]
    if any(bad):
        named = _windows(data, batch.index[[place for place, it in enumerate(bad) if it]])
        return f"Observations or actions are not finite in {named}", True
    named = _windows(data, batch.index)
    return f"The samples themselves are finite numbers: {named}, as run.seed {seed} draws them at step {step}", False


def _windows(data: PolicyData, index: Tensor) -> str:
    numbers = sorted(set(index.tolist()))
    named = ", ".join(f"{number} (episode {data.windows.episodes[number]})" for number in numbers[:SHOWN])
    rest = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"window{'s' if len(numbers) > 1 else ''} {named}{rest}"
