"""What the configuration sampler is conditioned on: a device's costs and a budget of latency and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import torch
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.cost import CostTensors
from training.predictor import ChoiceIndex
from training.space import SearchSpace
from training.subnet import Precision, Subnet

RESOURCES = 2  # latency, memory
TOLERANCE = 1e-6  # relative, of float32 costs


class BudgetError(UserError, ValueError):
    """A budget that no subnet can keep, or a device that is not there; the message names it and says what fits."""


def within(cost: float, budget: float) -> bool:
    """Whether a cost keeps a budget, to the rounding of float32 costs."""
    return cost <= budget * (1.0 + TOLERANCE)


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A device and what a subnet may cost on it.

    Attributes:
        name: the device.
        costs: its costs.
        latency_ms: most milliseconds per chunk.
        memory_bytes: most bytes.
    """

    name: str
    costs: CostTensors
    latency_ms: float
    memory_bytes: float

    def fits(self, subnet: Subnet) -> bool:
        """Whether a subnet of integer precision keeps both budgets (to the rounding of float32 costs)."""
        cost = self.costs.total(subnet)
        return within(cost.latency_ms, self.latency_ms) and within(cost.memory_bytes, self.memory_bytes)

    def excess(self, subnet: Subnet) -> float:
        """Sum over both budgets of how far cost / budget is above 1; 0 where the subnet fits."""
        cost = self.costs.total(subnet)
        return max(0.0, cost.latency_ms / self.latency_ms - 1.0) + max(0.0, cost.memory_bytes / self.memory_bytes - 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class ConditionBatch:
    """B conditions as the sampler reads them, every cost divided by its budget.

    Attributes:
        relative: (B, 2, L, C) float32, what a kept block with a choice adds.
        fixed: (B, 2) float32, what everything outside the blocks takes.
        least: (B, 2) float32, the smallest subnet.
        greatest: (B, 2) float32, the largest subnet.
    """

    relative: Tensor
    fixed: Tensor
    least: Tensor
    greatest: Tensor


class Conditions:
    """Devices, measured (or modelled) and made up, from which conditions are drawn.

    Attributes:
        space: the search space.
        measured: devices by name, without the one that is held out.
        held_out: devices kept out of training.
    """

    def __init__(
        self,
        space: SearchSpace,
        measured: Mapping[str, CostTensors],
        synthetic: Sequence[CostTensors] = (),
        held_out: str | None = None,
        measured_share: float = 0.25,
    ) -> None:
        """Collect devices.

        Args:
            space: the search space that all costs are for.
            measured: costs by device.
            synthetic: made-up devices.
            held_out: name of a measured device that is never drawn.
            measured_share: share of draws from the measured devices, where there are both kinds.

        Raises:
            BudgetError: no device is left to draw from, or ``held_out`` is not among the measured ones.
        """
        if held_out is not None and held_out not in measured:
            names = ", ".join(sorted(measured)) or "none"
            raise BudgetError(f"held_out: expected one of the measured devices ({names}), got {held_out!r}")
        self.space = space
        self.measured = {name: costs for name, costs in measured.items() if name != held_out}
        self.held_out = {name: costs for name, costs in measured.items() if name == held_out}
        self.synthetic = list(synthetic)
        self._measured = list(self.measured.items())
        tables = [*self.measured.values(), *self.synthetic]
        if not tables:
            raise BudgetError("conditions: no device is left to draw from; give a look-up table or synthetic ones")
        self.measured_share = measured_share if self.synthetic and self.measured else float(bool(self.measured))
        self._added = torch.stack([torch.stack([t.latency.flatten(1), t.memory.flatten(1)]) for t in tables])
        self._fixed = torch.tensor([[t.fixed_latency, t.fixed_memory] for t in tables])
        self._least, self._greatest = _ends(space, self._added, self._fixed)

    def draw(self, generator: torch.Generator) -> Condition:
        """Draw a device and both budgets, log-uniform between the costs of its smallest and its largest subnet."""
        tables, budgets = self._draw(generator, 1)
        table = int(tables)
        latency, memory = budgets[0].tolist()
        return Condition(self._name(table), self._costs(table), latency, memory)

    def batch(self, generator: torch.Generator, count: int) -> ConditionBatch:
        """Draw ``count`` conditions like :meth:`draw`."""
        tables, budgets = self._draw(generator, count)
        return ConditionBatch(
            self._added[tables] / budgets[..., None, None],
            self._fixed[tables] / budgets,
            self._least[tables] / budgets,
            self._greatest[tables] / budgets,
        )

    def condition(self, name: str, latency_ms: float, memory_bytes: float) -> Condition:
        """The condition of a named device with given budgets.

        Raises:
            BudgetError: an unknown device, or a budget below what any network costs.
        """
        costs = self._named(name)
        for label, value, added, unit in (
            ("latency", latency_ms, costs.latency, "ms"),
            ("memory", memory_bytes, costs.memory, "bytes"),
        ):
            cheapest, needed = cheapest_subnet(costs, added)
            if not within(needed, value):
                raise BudgetError(
                    f"{name}: {label} budget {value:g} {unit} is below the {rounded_up(needed)} {unit} of the network "
                    f"that takes least ({self.space.name(cheapest)}); give at least that much"
                )
        return Condition(name, costs, float(latency_ms), float(memory_bytes))

    def between(self, name: str, share: float) -> Condition:
        """The condition of a named device with both budgets at ``share`` of the way from smallest to largest cost.

        Raises:
            BudgetError: an unknown device, or a share below 0.
        """
        if not share >= 0.0:
            raise BudgetError(f"{name}: expected a share of at least 0 of the way to the largest subnet, got {share}")
        costs = self._named(name)
        low, high = costs.total(smallest_subnet(self.space)), costs.total(largest_subnet(self.space))
        return Condition(
            name,
            costs,
            low.latency_ms + share * max(0.0, high.latency_ms - low.latency_ms),
            low.memory_bytes + share * max(0.0, high.memory_bytes - low.memory_bytes),
        )

    def _named(self, name: str) -> CostTensors:
        known = {**self.measured, **self.held_out}
        if name not in known:
            raise BudgetError(f"{name}: no such device; known: {', '.join(sorted(known)) or 'none'}")
        return known[name]

    def _name(self, table: int) -> str:
        if table < len(self._measured):
            return self._measured[table][0]
        return f"synthetic_{table - len(self._measured)}"

    def _costs(self, table: int) -> CostTensors:
        if table < len(self._measured):
            return self._measured[table][1]
        return self.synthetic[table - len(self._measured)]

    def _draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Table numbers (count,) and budgets (count, 2)."""
        uniform = torch.rand(count, 2 + RESOURCES, generator=generator, dtype=torch.float64)
        measured = len(self._measured)
        real = (uniform[:, 1] * measured).long()
        made_up = measured + (uniform[:, 1] * len(self.synthetic)).long()
        tables = torch.where(uniform[:, 0] < self.measured_share, real, made_up)
        low, high = self._least[tables].double(), self._greatest[tables].double()
        return tables, (low * (high / low) ** uniform[:, 2:]).float()


def condition_batch(space: SearchSpace, conditions: Sequence[Condition]) -> ConditionBatch:
    """The same conditions as the sampler reads them."""
    added = torch.stack(
        [torch.stack([c.costs.latency.flatten(1), c.costs.memory.flatten(1)]) for c in conditions]
    ).float()
    fixed = torch.tensor([[c.costs.fixed_latency, c.costs.fixed_memory] for c in conditions])
    budgets = torch.tensor([[c.latency_ms, c.memory_bytes] for c in conditions])
    least, greatest = _ends(space, added, fixed)
    return ConditionBatch(added / budgets[..., None, None], fixed / budgets, least / budgets, greatest / budgets)


def rounded_up(value: float) -> str:
    """A positive number with six digits that is not below it: what is told to be enough is enough."""
    return f"{Context(prec=6, rounding=ROUND_CEILING).create_decimal(repr(value)).normalize():f}"


def smallest_subnet(space: SearchSpace) -> Subnet:
    """The smallest subnet at the fewest bits."""
    return space.smallest(space.weight_bits[0], space.activation_bits[0])


def largest_subnet(space: SearchSpace) -> Subnet:
    """The largest subnet at the most integer bits."""
    return space.largest(Precision.INT, space.weight_bits[-1], space.activation_bits[-1])


def cheapest_subnet(costs: CostTensors, added: Tensor) -> tuple[Subnet, float]:
    """The network of least latency or memory at integer precision, and what it costs.

    That is not always the smallest one: a device may multiply narrow integers slowly. Of equal ones it is.

    Args:
        costs: of the device.
        added: ``costs.latency`` or ``costs.memory``, whichever is to be least.

    Returns:
        The network, and its milliseconds or bytes.
    """

    def cost(subnet: Subnet) -> float:
        total = costs.total(subnet)
        return total.latency_ms if added is costs.latency else total.memory_bytes

    smallest, least = smallest_subnet(costs.space), _least(costs.space, added)
    best = least if cost(least) < cost(smallest) * (1.0 - TOLERANCE) else smallest
    return best, cost(best)


def _least(space: SearchSpace, added: Tensor) -> Subnet:
    """The network with the least sum of ``added`` (L, H, M, W, A): few blocks, each with its cheapest choice."""
    index = ChoiceIndex(space)
    values, choices = added.flatten(1).masked_fill(~index.offered, float("inf")).min(dim=1)
    kept = set(space.always_kept)
    for group, blocks in space.groups.items():
        others = sorted((block for block in blocks if block not in kept), key=lambda block: float(values[block]))
        missing = space.least_depths[group] - sum(block in kept for block in blocks)
        kept.update(others[: max(0, missing)])
    return index.decode([int(choices[i]) if i in kept else index.count for i in range(len(choices))])


def _ends(space: SearchSpace, added: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (N, 2) of the smallest and the largest subnet from ``added`` (N, 2, L, C) and ``fixed`` (N, 2)."""
    index = ChoiceIndex(space)
    low = _sums(added, fixed, index.encode(smallest_subnet(space)))
    high = _sums(added, fixed, index.encode(largest_subnet(space)))
    return low, torch.maximum(low, high)  # where narrow integers are slow, the smallest network is not the cheapest


def _sums(added: Tensor, fixed: Tensor, numbers: Sequence[int]) -> Tensor:
    kept = [(block, number) for block, number in enumerate(numbers) if number < added.shape[3]]
    return fixed + torch.stack([added[:, :, block, number] for block, number in kept]).sum(dim=0)
