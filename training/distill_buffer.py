"""First-in-first-out buffer of visited states, and batches of noisy actions drawn from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.policy_data import Batch
from training.objective import Objective
from training.rollouts_group import Visited


class StateBuffer:
    """The newest states of the rollouts.

    Attributes:
        capacity: most states kept.
        count: states held.
        timesteps: (S,) int64, of the recorded denoising paths.
    """

    def __init__(self, capacity: int, timesteps: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Make an empty buffer."""
        self.capacity, self.timesteps = capacity, torch.from_numpy(timesteps.copy())
        self.count = 0
        self._next = 0
        self._arrays: dict[str, Tensor] = {}

    def add(self, visited: Visited) -> None:
        """Take states in; the oldest leave where there is no room.

        Raises:
            ValueError: there are more than the buffer holds.
        """
        if len(visited) > self.capacity:
            raise ValueError(f"buffer of {self.capacity} states, asked to take {len(visited)} at once")
        fresh = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(visited, name)))
            for name in ("observation", "path", "teacher", "known")
        }
        if not self._arrays:
            self._arrays = {
                name: torch.zeros((self.capacity, *values.shape[1:]), dtype=values.dtype)
                for name, values in fresh.items()
            }
        places = (self._next + torch.arange(len(visited))) % self.capacity
        for name, values in fresh.items():
            self._arrays[name][places] = values
        self._next = int((self._next + len(visited)) % self.capacity)
        self.count = min(self.capacity, self.count + len(visited))

    def draw(self, size: int, share: float, objective: Objective, levels: int, generator: torch.Generator) -> Batch:
        """Draw states with noisy actions of the tokens that are executed.

        Of any first rows of the batch a ``share`` is from denoising paths, the others are the teacher's actions with
        noise of a level below ``levels``.

        Returns:
            On the CPU: ``action`` (B, T, Da) holds the noisy actions x_t themselves, ``noise`` zeros.

        Raises:
            ValueError: the buffer is empty, or actions of the teacher are asked for and none is known.
        """
        held = {name: values[: self.count] for name, values in self._arrays.items()}
        order = torch.arange(size)
        own = ((order + 1) * share + 1e-9).floor() > (order * share + 1e-9).floor()
        taught = torch.nonzero(held["known"]).flatten() if held else torch.zeros(0)
        if not self.count or (not bool(own.all()) and not len(taught)):
            raise ValueError("the buffer holds no states with the teacher's actions" if self.count else "empty buffer")
        anywhere = torch.randint(self.count, (size,), generator=generator)
        place = torch.randint(len(self.timesteps), (size,), generator=generator)
        level = torch.randint(levels, (size,), generator=generator)
        eps = torch.randn((size, *held["teacher"].shape[1:]), generator=generator)
        which = torch.randint(max(1, len(taught)), (size,), generator=generator)
        index = torch.where(own, anywhere, taught[which]) if len(taught) else anywhere
        timesteps = torch.where(own, self.timesteps[place], level)
        signal, sigma = objective.signal.cpu()[level][:, None, None], objective.sigma.cpu()[level][:, None, None]
        noised = signal * held["teacher"][index] + sigma * eps
        noisy = torch.where(own[:, None, None], held["path"][index, place], noised)
        return Batch(held["observation"][index], noisy, timesteps, torch.zeros_like(noisy), index)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; the arrays only as far as they are filled."""
        arrays = {name: values[: self.count].clone() for name, values in self._arrays.items()}
        return {"arrays": arrays, "next": self._next, "count": self.count, "timesteps": self.timesteps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: it is of another capacity or of other denoising steps.
        """
        if state["count"] > self.capacity or not torch.equal(state["timesteps"], self.timesteps):
            raise ValueError("the stored buffer is of another capacity or of other denoising steps")
        self.count, self._next = int(state["count"]), int(state["next"])
        self._arrays = {}
        for name, values in state["arrays"].items():
            whole = torch.zeros((self.capacity, *values.shape[1:]), dtype=values.dtype)
            whole[: self.count] = values
            self._arrays[name] = whole
