"""Distance of a subnet to a teacher on fixed samples: what a search minimises, of any policy of elastic blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.nn.elastic_policy import ElasticPolicy
from training.subnet import Subnet


class DistanceError(UserError):
    """A distance that cannot be measured; the message says what is missing."""


class Measure(Protocol):
    """Measures subnets, in order."""

    def __call__(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        """Distances of ``subnets``, each as soon as it is known."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """Everything that another process needs to measure the same distances, as arrays; no file is read there.

    Attributes:
        make: makes the supernet, untrained.
        state: its averaged weights by name.
        batch_ranges, live: whether it quantizes activations by BatchQuant, and by the range of every batch.
        arguments: what it is called with; (N, ...) each.
        target: (N, T - first, Da) float32, what the teacher answers.
        first: tokens of its answer that do not count.
    """

    make: Callable[[], ElasticPolicy]
    state: Mapping[str, NDArray[Any]]
    batch_ranges: bool
    live: bool
    arguments: tuple[NDArray[Any], ...]
    target: NDArray[Any]
    first: int

    def unpacked(self) -> SubnetDistance:
        """The distance, with memory of its own: what arrived may be read-only and shared."""
        state = {name: torch.tensor(value) for name, value in self.state.items()}
        network = self.make().filled(state, self.batch_ranges, self.live)
        network.requires_grad_(False).eval()
        arguments = tuple(torch.tensor(value) for value in self.arguments)
        return SubnetDistance(network, arguments, torch.tensor(self.target), self.first)


class SubnetDistance:
    """Mean squared difference between what a subnet and the teacher answer, both in float32.

    Attributes:
        network: that subnets are activated in.
    """

    def __init__(self, network: ElasticPolicy, arguments: tuple[Tensor, ...], target: Tensor, first: int = 0) -> None:
        """Take the network and the samples.

        Args:
            network: the supernet, in evaluation mode.
            arguments: what it is called with, such as (N, T, Da) float32 noisy actions, (N,) int64 time steps and
                (N, To, Do) float32 observations; it answers (N, T, Da).
            target: (N, T - first, Da) float32, what the teacher answers.
            first: tokens that do not count, such as those of the past.
        """
        self.network = network
        self._arguments, self._target, self._first = arguments, target, first

    def distance(self, subnet: Subnet) -> float:
        """Distance of one subnet."""
        self.network.activate(subnet)
        with torch.inference_mode():
            predicted = self.network(*self._arguments)[:, self._first :]
            return float(torch.nn.functional.mse_loss(predicted, self._target))

    def __call__(self, subnets: Sequence[Subnet]) -> Iterator[float]:
        """Distances of ``subnets``, one after the other."""
        return (self.distance(subnet) for subnet in subnets)

    def parcel(self) -> Parcel:
        """The same for another process."""
        network = self.network
        state = {name: value.cpu().numpy() for name, value in network.state_dict().items()}
        make = network.blueprint(list(enumerate(network.sizes)))
        arguments = tuple(tensor.cpu().numpy() for tensor in self._arguments)
        ranges = network.batch_ranges, network.live_ranges
        return Parcel(make, state, *ranges, arguments, self._target.cpu().numpy(), self._first)
