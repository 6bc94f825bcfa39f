"""Measure a look-up table on this computer: every block size of a space, in the context of a whole network.

A block's time is the difference between a network with and without it. The network without is half as deep as the
policy, of middle-sized blocks; the ones with it have the other half of their blocks of the size in question. All are
timed in turn as whole chunks of denoising steps on the engines the robot runs (``training.profile_runtime``). Together
with networks of few blocks and random ones they tell what stays in the processor's cache (``training.profile_fit``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from torch import Generator
from tqdm import tqdm

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.devices.detect import Device, detect
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.engines import ONNXRUNTIME
from training.cost import activation_bytes, fixed_bytes
from training.files import write_atomically
from training.lut import DeviceFacts, LookUpTable, stored_as
from training.profile_check import Measured, fitted, random_subnet, validation
from training.profile_conditions import clocks
from training.profile_fit import MemoryFit, Weighed, fit_memory
from training.profile_graphs import INTEGER, INTEGER_A4, BlockSize, PolicyGraphs
from training.profile_networks import TOGETHER, Networks, Workbench, at_speed_of, groups_of
from training.profile_runtime import ProfiledRuntime, profiled_runtime
from training.profile_table import CONTEXTS, Facts, GroupTimes, Layout, ProfileSettings, table_of
from training.profile_timing import BURST, SETTLE, TimedNetwork, time_in_turn
from training.space import SearchSpace
from training.space_counts import real_bytes
from training.subnet import Precision, Subnet, make_layer

GRAPHS = 5  # counts changes of what is timed: an interrupted measurement of something else is not continued
WEIGHED = 6  # random networks whose memory is measured, beside the smallest and the largest


class ProfileError(UserError, ValueError):
    """A measurement that cannot be made or continued; the message says why and what to do."""


def measure(
    space: SearchSpace,
    graphs: PolicyGraphs,
    settings: ProfileSettings,
    progress: Path | None = None,
    quiet: bool = True,
    runtime: ProfiledRuntime | None = None,
) -> LookUpTable:
    """Measure every entry of ``space`` on this computer.

    Args:
        space: what to measure; all blocks of one kind and size, with the tokens that are executed.
        graphs: makes the networks, with as many tokens.
        settings: how.
        progress: file that holds what is measured so far, from which an interrupted measurement continues. It is left
            there for the caller to remove once the table is safe.
        quiet: no progress bar.
        runtime: what executes the networks; by default ONNX Runtime.

    Raises:
        ProfileError: blocks differ, the progress file is of another measurement, or the runtime does not multiply
            integers.
        EngineError: the runtime cannot load a network.
        MeasurementError: memory cannot be measured.
        WriteError: the progress file cannot be written.
    """
    kinds = {(b.kind, b.dim, b.heads, b.head_dim, b.mlp, b.tokens, b.memory_tokens) for b in space.shape.blocks}
    if len(kinds) != 1:
        raise ProfileError(f"{space.shape.backbone}: blocks of {len(kinds)} kinds or sizes; one can be measured")
    device = detect()
    runtime = runtime or profiled_runtime(ONNXRUNTIME, device)
    return _Measurement(Workbench(space, graphs, settings, runtime), device, progress).run(quiet)


class _Progress(StrictModel):
    """What an interrupted measurement leaves: what is measured so far, under the settings it belongs to.

    ``memory`` holds the bytes that some networks of each checked precision take.
    """

    settings: str
    load: float
    clocks: str
    memory: dict[Precision, tuple[int, ...]]
    results: dict[str, GroupTimes]


class _Measurement:
    """One measurement of one space."""

    def __init__(self, bench: Workbench, device: Device, progress: Path | None) -> None:
        self._bench, self._device, self._file = bench, device, progress
        self._space, self._settings, self._runtime = bench.space, bench.settings, bench.runtime
        self._heads, self._widths = self._space.head_choices[0], self._space.mlp_choices[0]
        self._layout: Layout = bench.layout
        self._checked = bench.checked()

    def run(self, quiet: bool) -> LookUpTable:
        progress = self._begin()
        results = dict(progress.results)
        jobs = list(self._jobs())
        left = [(key, networks) for key, networks in jobs if key not in results]
        # What is there already counts as done but not for the speed, or the remaining time would be too short.
        done = len(jobs) - len(left)
        with tqdm(total=len(jobs), initial=done, unit="group", disable=quiet, desc=self._settings.name) as bar:
            for key, networks in left:
                bar.set_postfix_str(key)
                results[key] = GroupTimes.of(time_in_turn(networks(), *self._effort(key)))
                self._keep(progress.model_copy(update={"results": results}))
                bar.update(1)
        facts = Facts(
            device=DeviceFacts(
                name=self._device.name,
                fingerprint=self._device.fingerprint,
                memory_bytes=self._device.memory_bytes,
            ),
            runtime=self._runtime.name,
            versions=dict(self._runtime.versions),
            forms=self._runtime.forms,
            memory={precision: self._memory_fit(precision, progress.memory[precision]) for precision in self._checked},
            load=progress.load,
            notes=(*self._runtime.notes, progress.clocks),
        )
        table = table_of(space=self._space, settings=self._settings, times=results, facts=facts)
        return self._fitted_table(table, results)

    # -- what is timed ------------------------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[tuple[str, Networks]]:
        """Groups of networks, the first of each the reference, made only when their turn comes."""
        for executed in self._layout.executed:
            for key, networks in self._layout.networks(self._space, executed):
                yield key, partial(self._in_turn, TimedNetwork.denoise, executed, networks)
            context = self._layout.context(executed)
            sizes = [BlockSize(heads, self._widths[0], executed) for heads in self._heads]
            networks = [[*context, *[size] * self._layout.added] for size in sizes]
            yield f"chunk {executed}", partial(self._in_turn, TimedNetwork.encode, executed, networks)
        yield CONTEXTS, self._contexts
        for precision in self._checked:
            for number, part in enumerate(groups_of(self._random_subnets(precision))):
                yield f"subnets {precision.value} {number * TOGETHER}", partial(self._bench.subnets, part)

    def _effort(self, key: str) -> tuple[int, int]:
        """Rounds and warm-ups of a group.

        Graphs that run once per chunk take microseconds, so more of them cost nothing; random subnets only check what
        was measured, so a quarter is enough for each.
        """
        rounds, warm_ups = self._settings.rounds, self._settings.warm_ups
        if key.startswith("subnets"):
            return max(1, rounds // 4), warm_ups // 4
        return (5 * rounds if key.startswith("chunk") else rounds), warm_ups

    def _in_turn(
        self, part: Callable[[TimedNetwork], object], executed: str, networks: Sequence[Sequence[BlockSize]]
    ) -> list[Callable[[], object]]:
        """A part of the context network, and of each of ``networks``."""
        return [partial(part, self._bench.network(blocks)) for blocks in (self._layout.context(executed), *networks)]

    def _contexts(self) -> list[Callable[[], object]]:
        """Denoising steps of the context network of every form."""
        return [partial(TimedNetwork.denoise, self._bench.network(blocks)) for blocks in self._layout.contexts()]

    def _random_subnets(self, precision: Precision) -> list[Subnet]:
        generator = Generator().manual_seed(0)
        return [random_subnet(self._space, precision, generator) for _ in range(self._settings.subnets)]

    # -- keeping and continuing ---------------------------------------------------------------------------------------

    def _begin(self) -> _Progress:
        """What the progress file holds, or a beginning."""
        if self._file is not None and self._file.exists():
            try:
                found = _Progress.model_validate_json(self._file.read_bytes(), strict=True)
            except (OSError, ValidationError) as error:
                raise ProfileError(f"{self._file}: no readable progress; remove it to measure anew") from error
            if found.settings != self._fingerprint():
                raise ProfileError(
                    f"{self._file}: begun with other settings, versions or on another device; remove it to measure anew"
                )
            return found
        self._check_integer_products()
        load = os.getloadavg()[0]
        memory = {p: tuple(self._bench.memory(s) for s in self._weighed(p)) for p in self._checked}
        return _Progress(
            settings=self._fingerprint(),
            load=load,
            clocks=clocks(self._runtime.on_gpu),
            memory=memory,
            results={},
        )

    def _keep(self, progress: _Progress) -> None:
        if self._file is not None:
            write_atomically(self._file, progress.model_dump_json().encode())

    def _fingerprint(self) -> str:
        """Hash of everything that two measurements must share to be one."""
        settings = self._settings
        facts = {
            "graphs": GRAPHS,
            "device": self._device.fingerprint,
            "runtime": self._runtime.name,
            "versions": dict(self._runtime.versions),
            # As before layers could stay in floating point, so that measurements that were begun then go on.
            "shape": repr(self._space.shape).replace(", quantized=True", ""),
            "space": json.loads(self._space.config.identity()),
            "diffusion": settings.diffusion.model_dump(mode="json"),
            "numbers": [settings.threads, settings.runs, settings.warm_ups, settings.subnets, BURST, SETTLE],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _check_integer_products(self) -> None:
        """The table says that integer blocks execute as int8: see that this runtime really multiplies integers."""
        if self._runtime.integer_weights is None:
            return
        block, linears = self._space.shape.blocks[0], self._bench.graphs.step_linears
        for executed in (INTEGER, INTEGER_A4):
            if executed not in self._layout.executed:
                continue
            data, _ = self._bench.graphs.step([BlockSize(block.heads, block.mlp, executed)])
            found = self._runtime.integer_weights(data, "profile.onnx")
            count = len({name for name in found if name.startswith("blocks.0") and name.endswith(".weight")})
            if count != len(linears):
                version = next(iter(self._runtime.versions.values()))
                raise ProfileError(
                    f"{self._runtime.name} {version} multiplies integers in {count} of {len(linears)} linears of a "
                    f"quantized block; its table would not be one of {executed}"
                )

    # -- memory -------------------------------------------------------------------------------------------------------

    def _weighed(self, precision: Precision) -> list[Subnet]:
        """Networks whose memory is measured: the smallest, the largest, and random ones."""
        generator = Generator().manual_seed(1)
        low, high = ((f(self._space.weight_bits), f(self._space.activation_bits)) for f in (min, max))
        smallest = self._space.smallest(*low).layers
        return [
            Subnet(tuple(x and make_layer((x.heads, x.mlp), precision, *low) for x in smallest), precision),
            self._space.largest(precision, *high),
            *(random_subnet(self._space, precision, generator) for _ in range(WEIGHED)),
        ]

    def _memory_fit(self, precision: Precision, totals: Sequence[int]) -> MemoryFit:
        """What tells memory from weights, on this runtime."""
        shape, form, weighed = self._space.shape, self._runtime.forms[precision], []
        for subnet, total in zip(self._weighed(precision), totals, strict=True):
            stored = stored_as(subnet, form.stored_bits)
            outside = fixed_bytes(shape, stored.precision)
            activation = max(activation_bytes(shape.blocks[i], *self._size(subnet, i)) for i in subnet.kept)
            weighed.append(Weighed(outside + activation, real_bytes(shape, stored) - outside, subnet.depth, total))
        return fit_memory(weighed)

    def _size(self, subnet: Subnet, block: int) -> tuple[int, int]:
        layer = subnet.layers[block]
        assert layer is not None
        return layer.heads, layer.mlp

    # -- what all networks tell together ------------------------------------------------------------------------------

    def _fitted_table(self, table: LookUpTable, results: dict[str, GroupTimes]) -> LookUpTable:
        """Explain all networks at once, and compare predictions with random subnets that had no part in it."""
        shape, steps, reports = self._space.shape, self._settings.diffusion.steps, []
        for precision in self._checked:
            measured = self._measured(precision, results)
            table = fitted(table, self._bench, precision, results, measured[::2])
            held = measured[1::2]
            if held:
                reports.append(validation(table, shape, precision, held, steps))
        return table.model_copy(update={"validation": tuple(reports)})

    def _measured(self, precision: Precision, results: dict[str, GroupTimes]) -> Sequence[Measured]:
        """Random subnets with their milliseconds per chunk, at the speed at which the entries of a table hold."""
        subnets = self._random_subnets(precision)
        groups = [results[f"subnets {precision.value} {i}"] for i in range(0, len(subnets), TOGETHER)]
        expected = self._layout.context_chunk_ms(results, self._runtime.forms[precision].executed)
        return list(zip(subnets, at_speed_of(expected, groups), strict=True))
