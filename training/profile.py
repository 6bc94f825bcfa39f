"""Measure a look-up table on this computer: every block size of a space, in the context of a whole network.

A block's time is the difference between a network with and without it. The network without is half as deep as the
policy, of middle-sized blocks; the ones with it have the other half of their blocks of the size in question. All are
timed in turn as whole chunks of denoising steps on the engine the robot runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from pydantic import ValidationError
from torch import Generator
from tqdm import tqdm

from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.devices.detect import Device, detect
from dcqfa_ros.errors import UserError
from training.cost import activation_bytes
from training.export.executed import integer_weights
from training.lut import DeviceFacts, LookUpTable, write_atomically
from training.profile_check import Measured, random_subnet, validation, with_working_set
from training.profile_graphs import BlockSize, PolicyGraphs
from training.profile_memory import resident_growth
from training.profile_table import INTEGER, Facts, GroupTimes, Layout, ProfileSettings, table_of
from training.profile_timing import BURST, ChunkNetwork, StepNetwork, time_in_turn
from training.space import SearchSpace
from training.space_counts import real_bytes
from training.subnet import Precision, Subnet

_CHECKED_TOGETHER = 5


class ProfileError(UserError, ValueError):
    """A measurement that cannot be made or continued; the message says why and what to do."""


def measure(
    space: SearchSpace,
    graphs: PolicyGraphs,
    settings: ProfileSettings,
    progress: Path | None = None,
    quiet: bool = True,
) -> LookUpTable:
    """Measure every entry of ``space`` on this computer's CPU.

    Args:
        space: what to measure; all blocks of one kind and size, with the tokens that are executed.
        graphs: makes the networks, with as many tokens.
        settings: how.
        progress: file that holds what is measured so far, from which an interrupted measurement continues. It is left
            there for the caller to remove once the table is safe.
        quiet: no progress bar.

    Raises:
        ProfileError: blocks differ, the progress file is of another measurement, or the engine does not multiply
            integers.
        TableError: the progress file cannot be written.
    """
    kinds = {(b.kind, b.dim, b.heads, b.head_dim, b.mlp, b.tokens, b.memory_tokens) for b in space.shape.blocks}
    if len(kinds) != 1:
        raise ProfileError(f"{space.shape.backbone}: blocks of {len(kinds)} kinds or sizes; one can be measured")
    return _Measurement(space, graphs, settings, progress).run(quiet)


class _Runnable(Protocol):
    """A network to time."""

    def run(self) -> object:
        """Compute one unit of work."""
        ...


Networks = Callable[[], list[Callable[[], object]]]


class _Progress(StrictModel):
    """What an interrupted measurement leaves: groups measured so far, under the settings they belong to."""

    settings: str
    load: float
    workspace_bytes: int
    results: dict[str, GroupTimes]


class _Measurement:
    """One measurement of one space."""

    def __init__(
        self, space: SearchSpace, graphs: PolicyGraphs, settings: ProfileSettings, progress: Path | None
    ) -> None:
        self._space, self._graphs, self._settings, self._file = space, graphs, settings, progress
        self._block = space.shape.blocks[0]
        self._heads, self._widths = space.head_choices[0], space.mlp_choices[0]
        self._layout = Layout.of(space)
        # One precision per executed form.
        self._checked = (Precision.INT, *space.config.precisions[:1]) if settings.subnets else ()
        self._device: Device = detect()
        self._versions = {"onnxruntime": ort.__version__, "numpy": np.__version__}

    def run(self, quiet: bool) -> LookUpTable:
        progress = self._begin()
        results = dict(progress.results)
        with tqdm(list(self._jobs()), unit="group", disable=quiet, desc=self._settings.name) as bar:
            for key, networks in bar:
                if key in results:
                    continue
                bar.set_postfix_str(key)
                results[key] = GroupTimes.of(time_in_turn(networks(), *self._effort(key)))
                self._keep(progress.model_copy(update={"results": results}))
        facts = Facts(
            DeviceFacts(
                name=self._device.name,
                fingerprint=self._device.fingerprint,
                memory_bytes=self._device.memory_bytes,
            ),
            self._versions,
            progress.load,
            progress.workspace_bytes,
        )
        table = table_of(space=self._space, settings=self._settings, times=results, facts=facts)
        return self._checked_table(table, results)

    # -- what is timed ------------------------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[tuple[str, Networks]]:
        """Groups of networks, the first of each the reference, made only when their turn comes."""
        for executed in self._layout.executed:
            quantized = executed == INTEGER
            for heads in self._heads:
                sizes = [BlockSize(heads, mlp, quantized) for mlp in self._widths]
                yield f"step {executed} {heads}", partial(self._in_context, self._step, sizes, quantized)
            sizes = [BlockSize(heads, self._widths[0], quantized) for heads in self._heads]
            yield f"chunk {executed}", partial(self._in_context, self._chunk, sizes, quantized)
        for precision in self._checked:
            subnets = self._random_subnets(precision)
            for begin in range(0, len(subnets), _CHECKED_TOGETHER):
                part = subnets[begin : begin + _CHECKED_TOGETHER]
                yield f"subnets {precision.value} {begin}", partial(self._whole, part)

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
        self, make: Callable[[Sequence[BlockSize]], _Runnable], sizes: Sequence[BlockSize], quantized: bool
    ) -> list[Callable[[], object]]:
        context = self._layout.context(quantized)
        return [make(context).run, *(make([*context, *[size] * self._layout.added]).run for size in sizes)]

    def _whole(self, subnets: Sequence[Subnet]) -> list[Callable[[], object]]:
        """The context network as the reference against drift, then each subnet: whole chunks, observations included."""
        quantized = subnets[0].precision is Precision.INT
        networks = [self._layout.context(quantized)]
        networks += [[BlockSize(x.heads, x.mlp, quantized) for x in s.layers if x is not None] for s in subnets]
        return [partial(_run_both, self._chunk(blocks), self._step(blocks)) for blocks in networks]

    def _step(self, blocks: Sequence[BlockSize]) -> StepNetwork:
        return StepNetwork(self._graphs.step(blocks), self._settings.threads, self._settings.diffusion)

    def _chunk(self, blocks: Sequence[BlockSize]) -> ChunkNetwork:
        return ChunkNetwork(self._graphs.chunk(blocks), self._settings.threads)

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
        return _Progress(
            settings=self._fingerprint(), load=os.getloadavg()[0], workspace_bytes=self._workspace(), results={}
        )

    def _keep(self, progress: _Progress) -> None:
        if self._file is not None:
            write_atomically(self._file, progress.model_dump_json().encode())

    def _fingerprint(self) -> str:
        """Hash of everything that two measurements must share to be one."""
        settings = self._settings
        facts = {
            "device": self._device.fingerprint,
            "versions": self._versions,
            "shape": repr(self._space.shape),
            "space": self._space.config.model_dump(mode="json"),
            "diffusion": settings.diffusion.model_dump(mode="json"),
            "numbers": [settings.threads, settings.runs, settings.warm_ups, settings.subnets, BURST],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _check_integer_products(self) -> None:
        """The table says that integer blocks execute as int8: see that this engine really multiplies integers."""
        data, _ = self._graphs.step([BlockSize(self._block.heads, self._block.mlp, True)])
        found = {name for name in integer_weights(data, "profile.onnx") if name.startswith("blocks.0")}
        linears = {name for name in found if name.endswith(".weight")}
        if len(linears) != len(self._graphs.step_linears):
            raise ProfileError(
                f"onnxruntime {ort.__version__} multiplies integers in {len(linears)} of "
                f"{len(self._graphs.step_linears)} linears of a quantized block; its table would not be one of int8"
            )

    def _workspace(self) -> int:
        """Resident memory that the largest integer network takes beyond its weights and activations."""
        block, shape = self._block, self._space.shape
        blocks = [BlockSize(block.heads, block.mlp, True)] * len(shape.blocks)
        _run_both(self._chunk(blocks[:1]), self._step(blocks[:1]))  # loads the libraries and makes the blocks' weights

        def build() -> object:
            networks = self._chunk(blocks), self._step(blocks)
            _run_both(*networks)
            return networks

        known = real_bytes(shape, self._space.largest(Precision.INT, 8, 8))
        return max(0, resident_growth(build) - known - activation_bytes(block, block.heads, block.mlp))

    # -- prediction against measurement -------------------------------------------------------------------------------

    def _checked_table(self, table: LookUpTable, results: dict[str, GroupTimes]) -> LookUpTable:
        """Compare predictions with whole subnets, and add a working-set term where floating-point blocks do not add."""
        shape, steps, reports = self._space.shape, self._settings.diffusion.steps, []
        for precision in self._checked:
            measured = self._measured(precision, results)
            if precision is not Precision.INT:
                table, measured = with_working_set(table, shape, measured, steps)
            reports.append(validation(table, shape, precision, measured, steps))
        return table.model_copy(update={"validation": tuple(reports)})

    def _measured(self, precision: Precision, results: dict[str, GroupTimes]) -> Sequence[Measured]:
        """Random subnets with their milliseconds per chunk, at the common speed of the reference."""
        subnets = self._random_subnets(precision)
        groups = [results[f"subnets {precision.value} {i}"] for i in range(0, len(subnets), _CHECKED_TOGETHER)]
        common = float(np.median([group.median_ms[0] for group in groups]))
        times = [ms * common / group.median_ms[0] for group in groups for ms in group.median_ms[1:]]
        return list(zip(subnets, times, strict=True))


def _run_both(chunk: _Runnable, step: _Runnable) -> None:
    chunk.run()
    step.run()
