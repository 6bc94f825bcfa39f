"""From timed groups of networks to the entries of a look-up table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dcqfa_ros.bundle.schema import DiffusionSpec
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.errors import UserError
from training.lut import BlockEntry, DeviceFacts, ExecutedForm, FixedEntry, LookUpTable, Method, space_bits
from training.profile_fit import MemoryFit
from training.profile_graphs import BlockSize
from training.profile_runtime import Form
from training.profile_timing import BURST, Timing
from training.space import SearchSpace
from training.subnet import Precision

DIFFUSION = DiffusionSpec(
    train_timesteps=100, beta_schedule="squared_cosine", prediction="epsilon", clip_sample=1.0, sampler="ddim", steps=16
)
UNSTEADY = 0.05  # a reference whose interquartile range exceeds this share of its median tells of a busy computer
CONTEXTS = "contexts"  # the group of all context networks
SHALLOW = (1, 2, 4)  # blocks of the networks that tell what a cache holds


class SettingsError(UserError, ValueError):
    """A setting of a measurement that is out of range; the message names it."""


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How a table is measured.

    Attributes:
        name: of the table.
        threads: intra-operator threads of the engine.
        runs: timed chunks per network; a table that is kept has at least 100.
        warm_ups: untimed chunks before.
        subnets: random subnets per executed form that prediction and measurement are compared on; 0 for none.
        diffusion: the sampler whose loop is timed. Times in the table are per step, whatever its number of steps.
    """

    name: str
    threads: int = 1
    runs: int = 100
    warm_ups: int = 20
    subnets: int = 30
    diffusion: DiffusionSpec = DIFFUSION

    def __post_init__(self) -> None:
        for label, value, least in (
            ("threads", self.threads, 1),
            ("runs", self.runs, 1),
            ("warm-ups", self.warm_ups, 0),
            ("subnets", self.subnets, 0),
        ):
            if value < least:
                raise SettingsError(f"{label}: expected at least {least}, got {value}")

    @property
    def rounds(self) -> int:
        """Bursts of runs per network."""
        return -(-self.runs // BURST)


class GroupTimes(StrictModel):
    """Times of one group of networks: the reference first, then the others, milliseconds per run."""

    median_ms: tuple[float, ...]
    spread_ms: tuple[float, ...]

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> GroupTimes:
        """Keep the numbers of ``timings``."""
        return cls(median_ms=tuple(t.median_ms for t in timings), spread_ms=tuple(t.spread_ms for t in timings))


@dataclass(frozen=True, slots=True)
class Layout:
    """Which networks tell of a block size: ``around`` blocks of middle size, and ``added`` of the size in question.

    ``executed`` are the different forms that the runtime has for the precisions of the space, integers first.
    """

    middle: tuple[int, int]
    around: int
    added: int
    executed: tuple[str, ...]

    @classmethod
    def of(cls, space: SearchSpace, forms: Mapping[Precision, Form]) -> Layout:
        """Networks as deep as the policy (of two blocks at least)."""
        heads, widths = space.head_choices[0], space.mlp_choices[0]
        added = max(1, len(space.shape.blocks) // 2)
        executed = [forms[Precision.INT].of(a) for a in sorted(space.activation_bits, reverse=True)]
        executed += [forms[p].executed for p in space.config.precisions]
        return cls(
            (heads[len(heads) // 2], widths[len(widths) // 2]),
            max(1, len(space.shape.blocks) - added),
            added,
            tuple(dict.fromkeys([forms[Precision.INT].executed, *executed])),
        )

    def context(self, executed: str) -> list[BlockSize]:
        """The network without the blocks in question."""
        return [BlockSize(*self.middle, executed)] * self.around

    def networks(self, space: SearchSpace, executed: str) -> Iterator[tuple[str, list[list[BlockSize]]]]:
        """Groups of networks whose denoising steps are timed in turn with the context network, by name.

        ``step EXECUTED HEADS``: the context and blocks of each hidden width. ``shallow EXECUTED DEPTH``: few blocks of
        the least and the most heads and hidden channels; what stays in the processor's cache shows there.
        """
        heads, widths, context = space.head_choices[0], space.mlp_choices[0], self.context(executed)
        for h in heads:
            yield f"step {executed} {h}", [[*context, *[BlockSize(h, m, executed)] * self.added] for m in widths]
        corners = [BlockSize(h, m, executed) for h in _ends(heads) for m in _ends(widths)]
        for depth in SHALLOW:
            yield f"shallow {executed} {depth}", [[corner] * depth for corner in corners]

    def contexts(self) -> list[list[BlockSize]]:
        """The context networks of all forms, timed in turn as group :data:`CONTEXTS`: their ratios do not drift."""
        return [self.context(executed) for executed in self.executed]

    def context_ms(self, times: Mapping[str, GroupTimes], executed: str) -> float:
        """Milliseconds of a form's context network in all denoising steps, at the speed of the first form's groups.

        That speed is the middle one. The groups of other forms were timed later, when the computer may have been faster
        or slower, and their own reference cannot tell: only networks that are timed in turn can be compared.
        """
        groups = [group for key, group in times.items() if key.startswith(f"step {self.executed[0]} ")]
        together = times[CONTEXTS].median_ms
        ratio = together[self.executed.index(executed)] / together[0]
        return float(np.median([group.median_ms[0] for group in groups])) * ratio

    def context_chunk_ms(self, times: Mapping[str, GroupTimes], executed: str) -> float:
        """The same with what runs once per chunk, which is a hundredth of it and is not brought to that speed."""
        return self.context_ms(times, executed) + times[f"chunk {executed}"].median_ms[0]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the computer and the runtime.

    Attributes:
        device: the computer.
        runtime: its name.
        versions: of what decides how fast it is.
        forms: what the runtime executes for each precision.
        memory: how it follows from weights, by precision; those that execute alike are alike.
        load: load average before the measurement.
        notes: what else a reader should know.
    """

    device: DeviceFacts
    runtime: str
    versions: dict[str, str]
    forms: Mapping[Precision, Form]
    memory: Mapping[Precision, MemoryFit]
    load: float
    notes: tuple[str, ...] = ()


def table_of(
    space: SearchSpace, settings: ProfileSettings, times: Mapping[str, GroupTimes], facts: Facts
) -> LookUpTable:
    """Make the table of ``times``.

    Args:
        space: what was measured.
        settings: how.
        times: groups of :meth:`Layout.networks`, each with the context network first, ``chunk EXECUTED`` (the context
            alone, then with blocks of each head count), and :meth:`Layout.contexts`.
        facts: about the computer.
    """
    layout, whole = Layout.of(space, facts.forms), facts.forms[Precision.INT]
    forms = [
        ExecutedForm(precision=Precision.INT, w=w, a=a, executed=whole.of(a), stored_bits=whole.stored_bits)
        for w, a in space_bits(space, Precision.INT)
    ]
    forms += [
        ExecutedForm(precision=p, executed=facts.forms[p].executed, stored_bits=facts.forms[p].stored_bits)
        for p in space.config.precisions
    ]
    maker = _Entries(space, settings.diffusion.steps, layout, times, facts)
    blocks = tuple(entry for executed in layout.executed for entry in maker.blocks(executed))
    method = Method(
        statistic="median",
        runs=settings.rounds * BURST,
        warm_ups=settings.warm_ups,
        notes=tuple(_notes(space, layout, times, facts, blocks)),
    )
    return LookUpTable(
        name=settings.name,
        device=facts.device,
        runtime=facts.runtime,
        versions=facts.versions,
        threads=settings.threads,
        modelled=False,
        method=method,
        workspace_bytes=max(fit.workspace_bytes for fit in facts.memory.values()),
        forms=tuple(forms),
        blocks=blocks,
        fixed=tuple(maker.fixed(precision, blocks) for precision in space.precisions),
    )


def _notes(
    space: SearchSpace,
    layout: Layout,
    times: Mapping[str, GroupTimes],
    facts: Facts,
    blocks: Sequence[BlockEntry],
) -> Iterator[str]:
    yield (
        f"block times are differences of networks with and without {layout.added} blocks of a size, timed in turn with "
        "a reference network and corrected for its drift; a run is a whole chunk"
    )
    yield from facts.notes
    tokens, integers = space.shape.blocks[-1].tokens, facts.forms[Precision.INT]
    middle = {e.executed: e.step_ms for e in blocks if (e.heads, e.mlp) == layout.middle}
    if integers.narrow in middle and middle[integers.executed] <= 0.0:
        yield f"{tokens} tokens: what clipping 4-bit activations costs is lost in the noise of this measurement"
    elif integers.narrow in middle:
        longer = middle[integers.narrow] / middle[integers.executed] - 1.0
        yield f"{tokens} tokens: clipping 4-bit activations makes a block of middle size take {longer:+.1%} longer"
    spread = reference_spread(times)
    busy = "; the computer was busy: measure again when it is idle" if spread > UNSTEADY else ""
    steadiness = f"the reference varied by {spread:.1%} (interquartile range / median)"
    yield f"{tokens} tokens: load average before {facts.load:.1f}; {steadiness}{busy}"


def reference_spread(times: Mapping[str, GroupTimes]) -> float:
    """How much the reference network varied: interquartile range / median, in the middle of the groups."""
    return float(np.median([group.spread_ms[0] / group.median_ms[0] for group in times.values()]))


@dataclass(frozen=True, slots=True)
class _Entries:
    space: SearchSpace
    steps: int
    layout: Layout
    times: Mapping[str, GroupTimes]
    facts: Facts

    def blocks(self, executed: str) -> Iterator[BlockEntry]:
        block, chunk = self.space.shape.blocks[0], self.times[f"chunk {executed}"]
        for h, heads in enumerate(self.space.head_choices[0], start=1):
            step = self.times[f"step {executed} {heads}"]
            # Groups are timed one after the other: bring them to the common speed of the reference they share.
            common = self.layout.context_ms(self.times, executed) / step.median_ms[0] / self.steps
            for m, mlp in enumerate(self.space.mlp_choices[0], start=1):
                yield BlockEntry(
                    kind=block.kind,
                    dim=block.dim,
                    head_dim=block.head_dim,
                    tokens=block.tokens,
                    memory_tokens=block.memory_tokens,
                    heads=heads,
                    mlp=mlp,
                    executed=executed,
                    step_ms=_rounded(self._per_block(step, m) * common),
                    step_spread_ms=_rounded(step.spread_ms[m] / self.layout.added * common),
                    kv_ms=_rounded(self._per_block(chunk, h)),
                    kv_spread_ms=_rounded(chunk.spread_ms[h] / self.layout.added),
                )

    def fixed(self, precision: Precision, blocks: Sequence[BlockEntry]) -> FixedEntry:
        """What is left of the context network when its blocks are taken out."""
        executed, around = self.facts.forms[precision].executed, self.layout.around
        inside = next(e for e in blocks if (e.executed, (e.heads, e.mlp)) == (executed, self.layout.middle))
        step = self.layout.context_ms(self.times, executed) / self.steps - around * inside.step_ms
        chunk = self.times[f"chunk {executed}"].median_ms[0] - around * inside.kv_ms
        memory = next(fit for p, fit in self.facts.memory.items() if self.facts.forms[p].executed == executed)
        return FixedEntry(
            backbone=self.space.shape.backbone,
            fixed_parameters=self.space.shape.fixed_parameters,
            tokens=self.space.shape.blocks[-1].tokens,
            precision=precision,
            encoder_ms=_rounded(max(0.0, chunk)),
            step_fixed_ms=_rounded(max(0.0, step)),
            workspace_bytes=memory.workspace_bytes,
            block_workspace_bytes=memory.block_workspace_bytes,
            weight_copies=round(memory.weight_copies, 4),
        )

    def _per_block(self, group: GroupTimes, index: int) -> float:
        return max(0.0, group.median_ms[index] - group.median_ms[0]) / self.layout.added


def _ends(choices: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((choices[0], choices[-1])))


def _rounded(milliseconds: float) -> float:
    return round(milliseconds, 6)  # nanoseconds
