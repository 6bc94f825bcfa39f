"""The processes that train together (``torchrun``): all draw the same, each computes its share of every batch."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from dcqfa_ros.errors import UserError
from training.data.policy_data import Batch


class WorldError(UserError):
    """Processes that cannot train together; the message says what to change."""


class World:
    """This process among those started by ``torchrun``; alone where there is no ``WORLD_SIZE``.

    Attributes:
        rank, size: this process's number and how many there are.
    """

    def __init__(self) -> None:
        """Join the group (gloo on CPUs, NCCL on GPUs)."""
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(dist.destroy_process_group)

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This process's device of a kind, ``cpu`` or ``cuda``.

        Raises:
            WorldError: there are fewer CUDA devices than processes on this computer.
        """
        if kind == "cuda" and self.size > 1:
            number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if number >= count:
                raise WorldError(
                    f"run.device: cuda: process {number} of this computer has no device, PyTorch finds {count}; start "
                    f"{count} processes here (torchrun --nproc-per-node {count})"
                )
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
            return device
        return torch.device(kind)

    def check_batch(self, field: str, batch: int) -> None:
        """Refuse a batch that does not divide among the processes.

        Raises:
            WorldError: it does not.
        """
        if batch % self.size:
            raise WorldError(
                f"{field}: {batch} samples do not divide among {self.size} processes; give a multiple of {self.size}"
            )

    def check_same(self, facts: Mapping[str, str], folder: Path) -> None:
        """Refuse to begin with processes that hold different states: gradients of one would update another.

        Args:
            facts: of this process, by what they are of.
            folder: where the state was read.

        Raises:
            WorldError: another process has other ones; every process raises it.
        """
        if self.size == 1:
            return
        everywhere: list[Mapping[str, str]] = [{}] * self.size
        dist.all_gather_object(everywhere, dict(facts))
        first, found = everywhere[0], []
        for rank, theirs in enumerate(everywhere[1:], 1):
            names = [name for name in first if theirs.get(name) != first[name]]
            step = f", step {theirs['step']} instead of {first['step']}" if "step" in names else ""
            if names:
                found.append(f"process {rank} starts from another state than process 0 ({', '.join(names)}{step})")
        if found:
            raise WorldError(
                f"{folder}: {'; '.join(found)}: give all processes one folder that they share (--out), or copy that of "
                "process 0 to the computers of the others, and the same configuration and data"
            )

    def share(self, batch: Batch) -> Batch:
        """This process's samples of a batch that all have drawn."""
        if self.size == 1:
            return batch
        return batch.map(lambda values: values[self.rank :: self.size])

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their mean over the processes; those without one have none anywhere."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def mean(self, values: Sequence[float]) -> list[float]:
        """Means over the processes; every process gets the same."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor / self.size]

    def any(self, flag: bool) -> bool:
        """Whether any process says yes: a signal need not reach all of them at the same step."""
        return self.mean([float(flag)])[0] > 0.0

    def gather_rows(self, rows: Tensor, total: int) -> Tensor:
        """Join per-process rows ``[rank :: size]`` of a tensor of ``total`` rows; all get the whole."""
        if self.size == 1:
            return rows
        whole = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype)
        whole[self.rank :: self.size] = rows
        dist.all_reduce(whole)
        return whole

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()
