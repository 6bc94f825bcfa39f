"""Measure a look-up table on this computer: every block size of a space, in the context of a whole network.

A block's time is the difference between a network with and without it. The network without is half as deep as the
policy, of middle-sized blocks; the ones with it have the other half of their blocks of the size in question. All are
timed in turn as whole chunks of denoising steps on the engines the robot runs (``training.profile_runtime``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from torch import Generator
from tqdm import tqdm

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.devices.detect import Device, detect
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.engines import ONNXRUNTIME
from training.cost import activation_bytes
from training.lut import DeviceFacts, LookUpTable, StoredBits, write_atomically
from training.profile_check import Measured, random_subnet, reference_ms, validation, with_working_set
from training.profile_conditions import clocks
from training.profile_graphs import INTEGER, INTEGER_A4, BlockSize, PolicyGraphs
from training.profile_networks import TOGETHER, Networks, Workbench, at_speed_of, groups_of
from training.profile_runtime import Form, ProfiledRuntime, profiled_runtime
from training.profile_table import Facts, GroupTimes, Layout, ProfileSettings, table_of
from training.profile_timing import BURST, TimedNetwork, time_in_turn
from training.space import SearchSpace
from training.space_counts import real_bytes
from training.subnet import Layer, Precision, Subnet

GRAPHS = 2  # counts changes of the timed graphs: an interrupted measurement of others is not continued


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
        TableError: the progress file cannot be written.
    """
    kinds = {(b.kind, b.dim, b.heads, b.head_dim, b.mlp, b.tokens, b.memory_tokens) for b in space.shape.blocks}
    if len(kinds) != 1:
        raise ProfileError(f"{space.shape.backbone}: blocks of {len(kinds)} kinds or sizes; one can be measured")
    device = detect()
    runtime = runtime or profiled_runtime(ONNXRUNTIME, device)
    return _Measurement(Workbench(space, graphs, settings, runtime), device, progress).run(quiet)


class _Progress(StrictModel):
    """What an interrupted measurement leaves: what is measured so far, under the settings it belongs to.

    ``memory`` holds the bytes that the smallest and the largest integer network take.
    """

    settings: str
    load: float
    clocks: str
    memory: tuple[int, int]
    results: dict[str, GroupTimes]


class _Measurement:
    """One measurement of one space."""

    def __init__(self, bench: Workbench, device: Device, progress: Path | None) -> None:
        self._bench, self._device, self._file = bench, device, progress
        self._space, self._settings, self._runtime = bench.space, bench.settings, bench.runtime
        self._heads, self._widths = self._space.head_choices[0], self._space.mlp_choices[0]
        self._layout: Layout = bench.layout
        self._checked = bench.checked() if self._settings.subnets else ()

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
        stored_bits, workspace = self._memory_model(*progress.memory)
        forms: Mapping[Precision, Form] = {
            **self._runtime.forms,
            Precision.INT: replace(self._runtime.forms[Precision.INT], stored_bits=stored_bits),
        }
        facts = Facts(
            device=DeviceFacts(
                name=self._device.name,
                fingerprint=self._device.fingerprint,
                memory_bytes=self._device.memory_bytes,
            ),
            runtime=self._runtime.name,
            versions=dict(self._runtime.versions),
            forms=forms,
            workspace_bytes=workspace,
            load=progress.load,
            notes=(
                *self._runtime.notes,
                f"memory: {stored_bits} bits per weight of an integer block, copies and kernels included, fit it best",
                progress.clocks,
            ),
        )
        table = table_of(space=self._space, settings=self._settings, times=results, facts=facts)
        return self._checked_table(table, results)

    # -- what is timed ------------------------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[tuple[str, Networks]]:
        """Groups of networks, the first of each the reference, made only when their turn comes."""
        for executed in self._layout.executed:
            for heads in self._heads:
                sizes = [BlockSize(heads, mlp, executed) for mlp in self._widths]
                yield f"step {executed} {heads}", partial(self._in_context, TimedNetwork.denoise, sizes, executed)
            sizes = [BlockSize(heads, self._widths[0], executed) for heads in self._heads]
            yield f"chunk {executed}", partial(self._in_context, TimedNetwork.encode, sizes, executed)
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

    def _in_context(
        self, part: Callable[[TimedNetwork], object], sizes: Sequence[BlockSize], executed: str
    ) -> list[Callable[[], object]]:
        context = self._layout.context(executed)
        networks = [context, *([*context, *[size] * self._layout.added] for size in sizes)]
        return [partial(part, self._bench.network(blocks)) for blocks in networks]

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
        memory = tuple(self._bench.memory(subnet) for subnet in self._extremes())
        return _Progress(
            settings=self._fingerprint(),
            load=load,
            clocks=clocks(self._runtime.on_gpu),
            memory=(memory[0], memory[1]),
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
            "shape": repr(self._space.shape),
            "space": self._space.config.model_dump(mode="json"),
            "diffusion": settings.diffusion.model_dump(mode="json"),
            "numbers": [settings.threads, settings.runs, settings.warm_ups, settings.subnets, BURST],
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

    def _extremes(self) -> tuple[Subnet, Subnet]:
        """The smallest and the largest integer network."""
        weight, activation = self._space.weight_bits, self._space.activation_bits
        return (
            self._space.smallest(min(weight), min(activation)),
            self._space.largest(Precision.INT, max(weight), max(activation)),
        )

    def _memory_model(self, *measured: int) -> tuple[StoredBits, int]:
        """Bits per weight and workspace that tell best what the smallest and the largest integer network take."""
        best: tuple[float, StoredBits, int] | None = None
        choices: tuple[StoredBits, ...] = (8, 16, 32)
        for bits in choices:
            known = [self._known_bytes(subnet, bits) for subnet in self._extremes()]
            weights = [1.0 / total for total in measured]
            # The workspace that makes the two relative errors equal and opposite.
            workspace = max(
                0.0, sum((t - k) * w for t, k, w in zip(measured, known, weights, strict=True)) / sum(weights)
            )
            error = max(abs(k + workspace - t) / t for t, k in zip(measured, known, strict=True))
            if best is None or error < best[0]:
                best = error, bits, int(workspace)
        assert best is not None
        return best[1], best[2]

    def _known_bytes(self, subnet: Subnet, bits: StoredBits) -> int:
        """Weights at ``bits`` each, scales, what lies outside the blocks, and activations."""
        shape = self._space.shape
        layers = tuple(x and Layer(x.heads, x.mlp, bits, x.a) for x in subnet.layers)
        activation = max(
            activation_bytes(block, layer.heads, layer.mlp)
            for block, layer in zip(shape.blocks, layers, strict=True)
            if layer is not None
        )
        return real_bytes(shape, Subnet(layers, Precision.INT)) + activation

    # -- prediction against measurement -------------------------------------------------------------------------------

    def _checked_table(self, table: LookUpTable, results: dict[str, GroupTimes]) -> LookUpTable:
        """Compare predictions with whole subnets, and add a working-set term where floating-point blocks do not add."""
        shape, steps, reports = self._space.shape, self._settings.diffusion.steps, []
        for precision in self._checked:
            measured = self._measured(table, precision, results)
            if precision is not Precision.INT:
                table, measured = with_working_set(table, shape, measured, steps)
            reports.append(validation(table, shape, precision, measured, steps))
        return table.model_copy(update={"validation": tuple(reports)})

    def _measured(self, table: LookUpTable, precision: Precision, results: dict[str, GroupTimes]) -> Sequence[Measured]:
        """Random subnets with their milliseconds per chunk, at the speed at which the entries of ``table`` hold."""
        subnets = self._random_subnets(precision)
        groups = [results[f"subnets {precision.value} {i}"] for i in range(0, len(subnets), TOGETHER)]
        steps = self._settings.diffusion.steps
        expected = reference_ms(table, self._space.shape, self._bench.reference(precision), steps)
        return list(zip(subnets, at_speed_of(expected, groups), strict=True))
