"""The entries of a comparison, opened: what each computes, where it comes from, how large it is, what it cost.

What can be exported is exported and evaluated as the graphs that a robot runs, on ONNX Runtime; the rest (baselines,
whose quantizers have no graph) is evaluated in PyTorch with its quantizers simulated. Every contender says which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.runtime.engine import ROLES, Engine
from dcqfa_ros.runtime.ort_engine import OnnxRuntimeEngine
from training.compare.config import Entry
from training.compare.cost import Cost
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.subnet import Subnet
from training.torch_engine import TorchEngine
from training.warm_start import state_sha256

MIB = 2**20
ONNX = "exported graphs on ONNX Runtime, as the robot runs them"
FLOAT_TABLE = "exported graphs on ONNX Runtime, weights stored as float16 and computed in float32"
SIMULATED = "PyTorch with simulated quantizers: the method has no exported form here"


@dataclass(frozen=True, slots=True)
class Runnable:
    """What a process needs to run an entry: its meaning, and either graphs or a PyTorch network."""

    spec: BundleSpec
    graphs: Mapping[str, bytes] | None
    network: nn.Module | None

    def engine(self, large_batches: bool = True) -> Engine:
        """A new engine, one thread.

        Args:
            large_batches: see :class:`OnnxRuntimeEngine`; False: as the robot runs it.

        Raises:
            EngineError: a graph is damaged.
        """
        if self.graphs is not None:
            return OnnxRuntimeEngine(dict(self.graphs), threads=1, large_batches=large_batches)
        assert isinstance(self.network, DiffusionPolicyT)
        return TorchEngine(self.network, 1)

    @property
    def artifact(self) -> str:
        """SHA-256 of what runs: of the graphs, or of every tensor of the network."""
        if self.graphs is not None:
            files = (hashlib.sha256(self.graphs[role]).hexdigest() for role in ROLES)
            return hashlib.sha256("".join(files).encode()).hexdigest()
        assert self.network is not None
        return state_sha256({k: v for k, v in self.network.state_dict().items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True, slots=True)
class Contender:
    """An entry that was found.

    Attributes:
        entry: as asked for.
        runnable: what runs.
        weights: SHA-256 of the trained weights behind it.
        data: SHA-256 of the demonstrations behind it; None where its files do not tell.
        origin: SHA-256 of the full-precision policy it comes from, None likewise.
        executed: how it is evaluated.
        device: what a device executes, as far as that differs.
        subnet: what the look-up table knows it as; None where it cannot be told.
        size: ``parameters``, ``paper_mib`` (parameters x bits / 8) and ``artifact_mib`` with what that is of.
        cost: of training.
        report: of a baseline.
    """

    entry: Entry
    runnable: Runnable
    weights: str
    data: str | None
    origin: str | None
    executed: str
    device: str | None
    subnet: Subnet | None
    size: dict[str, Any]
    cost: Cost
    report: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """What must agree before results are put together."""
        entry = self.entry
        return {
            "kind": entry.kind,
            "weights": self.weights,
            "artifact": self.runnable.artifact,
            "data": self.data,
            "policy": self.origin,
            "bits": entry.bits,
            "variant": entry.variant,
            "subnet": entry.subnet,
            "baseline": entry.baseline,
            "baseline_bits": entry.baseline_bits,
            "options": dict(sorted(entry.options.items())),
            "seed": entry.seed,
        }
