"""Networks of chosen blocks on one runtime: opened, timed in groups, and weighed in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcqfa_ros.runtime.huge_pages import use_huge_pages
from training.cost import cost
from training.lut import LookUpTable
from training.profile_graphs import BlockSize, PolicyGraphs
from training.profile_memory import engine_growth
from training.profile_runtime import ProfiledRuntime
from training.profile_table import GroupTimes, Layout, ProfileSettings
from training.profile_timing import TimedNetwork, variant_of
from training.space import SearchSpace
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

TOGETHER = 5  # networks that are timed in turn with one reference; more would not all fit in memory
Networks = Callable[[], list[Callable[[], object]]]


@dataclass(frozen=True, slots=True)
class Workbench:
    """Makes and measures networks of one space on one runtime."""

    space: SearchSpace
    graphs: PolicyGraphs
    settings: ProfileSettings
    runtime: ProfiledRuntime

    @property
    def layout(self) -> Layout:
        """Which networks tell of a block size."""
        return Layout.of(self.space, self.runtime.forms)

    def checked(self) -> tuple[Precision, ...]:
        """One precision for each form that whole networks are executed in, integers first."""
        first: dict[str, Precision] = {}
        for precision in (Precision.INT, *self.space.config.precisions):
            first.setdefault(self.runtime.forms[precision].executed, precision)
        return tuple(first.values())

    def blocks(self, subnet: Subnet) -> list[BlockSize]:
        """The blocks that a subnet keeps, as they are executed."""
        form = self.runtime.forms[subnet.precision]
        return [BlockSize(layer.heads, layer.mlp, form.of(layer.a)) for layer in subnet.layers if layer is not None]

    def reference(self, precision: Precision) -> Subnet:
        """The context network as a subnet; its depth may be below the least of the space."""
        bits = FLOAT_BITS.get(precision)
        w, a = (bits, bits) if bits is not None else (max(self.space.weight_bits), max(self.space.activation_bits))
        layer = Layer(*self.layout.middle, w, a)
        skipped = len(self.space.shape.blocks) - self.layout.around
        return Subnet((layer,) * self.layout.around + (None,) * skipped, precision)

    def reference_ms(self, table: LookUpTable, precision: Precision) -> float:
        """Milliseconds of a chunk of the context network when ``table`` was measured.

        How much longer it takes now tells how much slower the computer is.

        Raises:
            TableError: the table lacks an entry of it.
        """
        shape, subnet, steps = self.space.shape, self.reference(precision), self.settings.diffusion.steps
        known = table.fixed_parts(shape, precision).context_step_ms
        if known is None:  # a table from before it was kept: its fixed part is what is left, unless nothing was
            return cost(table, shape, subnet, steps).latency_ms
        first, second = (cost(table, shape, subnet, count).latency_ms for count in (1, 2))
        return 2.0 * first - second + steps * known

    def network(self, blocks: Sequence[BlockSize]) -> TimedNetwork:
        """Open a network.

        Raises:
            EngineError: the runtime cannot load it.
        """
        files, feeds = variant_of(self.graphs, blocks, self.settings.diffusion.train_timesteps)
        network = TimedNetwork(self.runtime.open(files, self.settings.threads), feeds, self.settings.diffusion)
        network.chunk()  # takes its buffers
        use_huge_pages()  # the robot's worker process has them from the start
        return network

    def subnets(self, subnets: Sequence[Subnet]) -> list[Callable[[], object]]:
        """The context network as the reference against drift, then each subnet: whole chunks, observations included."""
        executed = self.runtime.forms[subnets[0].precision].executed
        networks = [self.layout.context(executed), *(self.blocks(subnet) for subnet in subnets)]
        return [self.network(blocks).chunk for blocks in networks]

    def memory(self, subnet: Subnet) -> int:
        """Bytes by which memory in use grows when a fresh process opens a subnet and runs it.

        Raises:
            MeasurementError: the process failed.
        """
        small = [BlockSize(*self.layout.middle, self.runtime.forms[subnet.precision].executed)]
        levels = self.settings.diffusion.train_timesteps
        first, second = (variant_of(self.graphs, blocks, levels) for blocks in (small, self.blocks(subnet)))
        return engine_growth(self.runtime.name, self.settings.threads, first, second, self.runtime.on_gpu)


def groups_of(subnets: Sequence[Subnet]) -> list[Sequence[Subnet]]:
    """Parts of ``subnets`` that are timed together."""
    return [subnets[begin : begin + TOGETHER] for begin in range(0, len(subnets), TOGETHER)]


def at_speed_of(reference_ms: float, groups: Sequence[GroupTimes]) -> list[float]:
    """Milliseconds of all networks but the references, at the speed at which those take ``reference_ms``."""
    return [ms * reference_ms / group.median_ms[0] for group in groups for ms in group.median_ms[1:]]
