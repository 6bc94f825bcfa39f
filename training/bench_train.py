"""What training a supernet costs beside training the plain policy: ``dcqfa bench train``.

Everything is measured in one run, in rounds in which all contenders take turns. A ratio is the median over the rounds
of the ratio within a round, so that drift and other load, which hit neighbours alike, cancel. Data are random numbers
of their shapes: no data set is needed, and neither trainer's drawing of windows is part of a step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcqfa_ros.bench.conditions import Conditions, no_garbage_collection, versions, watch_conditions
from dcqfa_ros.errors import UserError
from training.allocator import keep_freed_memory
from training.bench_contenders import SEED, PlainContender, SupernetContender, random_batch
from training.compiling import check_compiler
from training.config import ConfigError, TrainConfig
from training.draws import stratified_subnet
from training.objective import Objective
from training.policies.diffusion_policy_t import parameter_count
from training.sandwich import search_space
from training.space import SearchSpace
from training.subnet import Precision, Subnet

BATCH, ROUNDS = 128, 15
WARM_UP_ROUNDS = 2  # the first one compiles
DRAWS = 8  # fixed draws that stand for the sampled network of a set; their times are averaged
FORWARD_BATCH, FORWARD_REPEATS = 64, 5
SWITCHES, SWITCH_NETWORKS = 2000, 64
LOW_BITS = 4
PACKAGES = ("torch", "numpy")


class TrainBenchError(UserError, ValueError):
    """A benchmark of training that cannot be run as asked; the message names the option."""


@dataclass(frozen=True, slots=True)
class Options:
    """Batch of every network of a step, CPU threads and timed rounds; whether steps are compiled."""

    batch: int = BATCH
    threads: int = 1
    rounds: int = ROUNDS
    compile: bool = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            TrainBenchError: a value is too small.
        """
        for name, least in (("batch", 1), ("threads", 1), ("rounds", 2)):
            if getattr(self, name) < least:
                raise TrainBenchError(f"--{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the set's step: forward and backward of a network or of what all share, or the update; median."""

    label: str
    subnet: str | None
    ms: float


@dataclass(frozen=True, slots=True)
class TrainReport:
    """Result of :func:`bench_train`; times are medians in milliseconds, ratios medians of paired ratios.

    Attributes:
        plain_step_ms: whole step of the full-precision policy: forward, backward, clipping, AdamW, EMA.
        w4a4_step_ms, w4a4_step_ratio: whole step of the supernet with the largest network at W4A4, and against plain.
        set_ms, set_ratio: one step of {largest FP32, largest W4A4, smallest, one sampled}, each at the full batch, with
            one pass through what they share and one update, without the teacher's forward pass; the sampled one is the
            mean of several fixed draws.
        teacher_ms: forward pass of the teacher.
        set_with_teacher_ratio: the set and one teacher pass, against plain.
        smallest_forward_ratio: inference of the smallest network against the largest, both at W4A4 as the supernet
            runs them (quantized anew in every pass), in float32.
        smallest_forward_fp32_ratio: the same of both in full precision.
        smallest_forward_training_ratio: the first one in ``run.precision``; where matrix units make large products
            cheap, what is not a product weighs more.
        forward_ms: the medians behind these three.
        switch_us: mean time to activate another configuration.
        switch_parameter_bytes: bytes that all tensors hold which a switch makes.
        parts: the set's step in parts.
        plain_parameters, supernet_parameters: numbers of parameters; the supernet's include quantizer steps.
        warm_up_s: seconds until everything had been compiled and run ``WARM_UP_ROUNDS`` times.
    """

    plain_step_ms: float
    w4a4_step_ms: float
    w4a4_step_ratio: float
    set_ms: float
    set_ratio: float
    set_with_teacher_ratio: float
    teacher_ms: float
    smallest_forward_ratio: float
    smallest_forward_fp32_ratio: float
    smallest_forward_training_ratio: float
    forward_ms: dict[str, float]
    switch_us: float
    switch_parameter_bytes: int
    parts: tuple[Part, ...]
    config: str
    batch: int
    forward_batch: int
    threads: int
    rounds: int
    compile: bool
    precision: str
    device: str
    plain_parameters: int
    supernet_parameters: int
    warm_up_s: float
    conditions: Conditions
    versions: dict[str, str]


def sampled_subnets(space: SearchSpace, count: int) -> list[Subnet]:
    """The fixed draws that stand for the sampled network of a set."""
    generator = torch.Generator().manual_seed(SEED)
    return [stratified_subnet(space, generator) for _ in range(count)]


# Switching -----------------------------------------------------------------------------------------------------------


class NewTensors(TorchDispatchMode):
    """Counts what operators inside the block make.

    Attributes:
        bytes: sum over the storages of results that no argument shares.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.bytes = 0
        self._counted: list[torch.UntypedStorage] = []  # kept, so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operator and count."""
        del types
        result = func(*args, **(kwargs or {}))
        known = {s.data_ptr() for s in (*_storages((args, kwargs)), *self._counted)}
        for storage in _storages(result):
            if storage.nbytes() and storage.data_ptr() not in known:
                self.bytes += storage.nbytes()
                self._counted.append(storage)
                known.add(storage.data_ptr())
        return result


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def switching(activate: Callable[[Subnet], object], subnets: Sequence[Subnet], switches: int) -> tuple[float, int]:
    """Mean microseconds that ``activate`` takes between random ``subnets``, and bytes of the tensors it makes.

    Every configuration has been active once before: what all of them share is made at the first use of a bit width.
    """
    for subnet in subnets:
        activate(subnet)
    generator = random.Random(SEED)
    order = [subnets[generator.randrange(len(subnets))] for _ in range(switches)]
    with no_garbage_collection():
        begin = time.perf_counter()
        for subnet in order:
            activate(subnet)
        mean = (time.perf_counter() - begin) / switches
    with NewTensors() as made:
        for subnet in order[: len(subnets)]:
            activate(subnet)
    return 1e6 * mean, made.bytes


# Measurement ---------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Times of named pieces of work, one row per round.

    Attributes:
        rounds: seconds by name, of every round.
    """

    def __init__(self, device: torch.device) -> None:
        """Measure work on ``device``."""
        self.rounds: list[dict[str, float]] = []
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def start_round(self) -> None:
        """Begin the next round."""
        self.rounds.append({})

    def time(self, name: str, work: Callable[[], object]) -> None:
        """Do ``work`` and note how long it took."""
        self._wait()
        begin = time.perf_counter()
        work()
        self._wait()
        self.rounds[-1][name] = time.perf_counter() - begin

    def seconds(self, name: str) -> NDArray[np.float64]:
        """Times (rounds,) of ``name``."""
        return np.array([row[name] for row in self.rounds])


class _Rounds:
    """All contenders of a benchmark and one round of them."""

    def __init__(self, config: TrainConfig, options: Options) -> None:
        self.space = search_space(config)
        device = torch.device(config.run.device)
        self.objective = Objective(config, device)
        self.batch = random_batch(config, options.batch, device)
        self.small_batch = random_batch(config, FORWARD_BATCH, device)
        self.alpha = torch.ones(options.batch, device=device)
        self.watch = Stopwatch(device)
        space = self.space
        self.low = space.largest(Precision.INT, LOW_BITS, LOW_BITS)
        narrowest = (space.shallowest, min(space.config.head_ratios), min(space.config.mlp_ratios))
        smallest = space.smallest(LOW_BITS, LOW_BITS)
        self.members = {"largest": space.largest(), "w4a4": self.low, "smallest": smallest}
        self.members |= {f"sampled {place}": subnet for place, subnet in enumerate(sampled_subnets(space, DRAWS))}
        self.forwards = {
            "largest w4a4": (self.low, False),
            "smallest w4a4": (smallest, False),
            "largest fp32": (space.largest(), False),
            "smallest fp32": (space.uniform(*narrowest, Precision.FP32), False),
            "largest w4a4 as trained": (self.low, True),
            "smallest w4a4 as trained": (smallest, True),
        }
        self.plain = PlainContender(config, self.objective, options.compile)
        self.supernet = SupernetContender(config, self.objective, options.compile, self.small_batch)
        self.target = self.supernet.teach(self.batch)

    def run(self, number: int) -> None:
        """Run everything once, beginning with another contender every time."""
        self.watch.start_round()
        turns = (self._plain_step, self._low_step, self._set_step, self._forward_passes)
        for place in range(len(turns)):
            turns[(number + place) % len(turns)]()

    def _plain_step(self) -> None:
        self.watch.time("plain", lambda: self.plain.step(self.batch))

    def _low_step(self) -> None:
        def step() -> None:
            stem = self.supernet.begin(self.batch)
            self.supernet.learn(self.low, stem, self.batch, self.target, self.alpha)
            stem.backward()
            self.supernet.update()

        self.watch.time("low step", step)

    def _set_step(self) -> None:
        supernet, stems = self.supernet, []
        self.watch.time("teacher", lambda: supernet.teach(self.batch))
        self.watch.time("stem forward", lambda: stems.append(supernet.begin(self.batch)))
        for name, subnet in self.members.items():

            def learn(subnet: Subnet = subnet, dropout: bool = name == "largest") -> None:
                supernet.learn(subnet, stems[0], self.batch, self.target, self.alpha, dropout=dropout)

            self.watch.time(name, learn)
        self.watch.time("stem backward", lambda: stems[0].backward())
        self.watch.time("update", supernet.update)

    def _forward_passes(self) -> None:
        for repeat in range(FORWARD_REPEATS):
            for name, (subnet, autocast) in self.forwards.items():

                def infer(subnet: Subnet = subnet, autocast: bool = autocast) -> None:
                    self.supernet.infer(subnet, self.small_batch, autocast=autocast)

                self.watch.time(f"{name} {repeat}", infer)


def bench_train(config: TrainConfig, options: Options, progress: Callable[[str], object] | None = None) -> TrainReport:
    """Measure steps, set, forward passes and switches of a supernet beside the plain policy.

    Sets the number of CPU threads of this process, and that it keeps memory that is freed (as training does).

    Args:
        config: a training configuration with a ``supernet`` section; ``run.precision`` and ``run.device`` are obeyed.
        options: batch and length.
        progress: called with what is being done.

    Raises:
        ConfigError: there is no ``supernet`` section.
        SpaceError: the space lacks 4 bits or full precision.
        CompilerError: there is no compiler.
        TrainBenchError: the device does not exist.
    """
    if config.supernet is None:
        raise ConfigError(f"training configuration {config.name!r}: supernet: the section is missing")
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise TrainBenchError("--device cuda: PyTorch finds no CUDA device; use cpu")
    if options.compile:
        check_compiler()
    say = progress or (lambda _: None)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    began = time.perf_counter()
    say("preparing networks")
    rounds = _Rounds(config, options)
    for number in range(WARM_UP_ROUNDS):
        say("compiling" if options.compile and not number else "warming up")
        rounds.run(number)
    warm_up = time.perf_counter() - began
    rounds.watch.rounds.clear()
    conditions = watch_conditions()
    with no_garbage_collection():
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            rounds.run(number)
    circumstances = conditions()
    generator = torch.Generator().manual_seed(SEED + 1)
    networks = [stratified_subnet(rounds.space, generator) for _ in range(SWITCH_NETWORKS)]
    switch_us, switch_bytes = switching(rounds.supernet.model.activate, networks, SWITCHES)
    return TrainReport(
        **_figures(rounds),
        switch_us=round(switch_us, 3),
        switch_parameter_bytes=switch_bytes,
        config=config.name,
        batch=options.batch,
        forward_batch=FORWARD_BATCH,
        threads=options.threads,
        rounds=options.rounds,
        compile=options.compile,
        precision=config.run.precision,
        device=config.run.device,
        plain_parameters=parameter_count(rounds.plain.model),
        supernet_parameters=parameter_count(rounds.supernet.model),
        warm_up_s=round(warm_up, 1),
        conditions=circumstances,
        versions=versions(PACKAGES),
    )


def _figures(rounds: _Rounds) -> dict[str, Any]:
    """Medians and paired ratios of what the stopwatch of ``rounds`` holds."""
    seconds = rounds.watch.seconds
    plain, low, teacher, update = (seconds(name) for name in ("plain", "low step", "teacher", "update"))
    sampled = [name for name in rounds.members if name.startswith("sampled")]
    fixed = [name for name in rounds.members if name not in sampled]
    mean_sampled = np.mean([seconds(name) for name in sampled], axis=0)
    stem = seconds("stem forward") + seconds("stem backward")
    whole = np.sum([seconds(name) for name in fixed], axis=0) + mean_sampled + stem + update
    forward = {
        name: np.median([seconds(f"{name} {repeat}") for repeat in range(FORWARD_REPEATS)], axis=0)
        for name in rounds.forwards
    }
    parts = [Part(name, rounds.space.name(subnet), _ms(seconds(name))) for name, subnet in rounds.members.items()]
    return {
        "plain_step_ms": _ms(plain),
        "w4a4_step_ms": _ms(low),
        "w4a4_step_ratio": _ratio(low, plain),
        "set_ms": _ms(whole),
        "set_ratio": _ratio(whole, plain),
        "set_with_teacher_ratio": _ratio(whole + teacher, plain),
        "teacher_ms": _ms(teacher),
        "smallest_forward_ratio": _ratio(forward["smallest w4a4"], forward["largest w4a4"]),
        "smallest_forward_fp32_ratio": _ratio(forward["smallest fp32"], forward["largest fp32"]),
        "smallest_forward_training_ratio": _ratio(
            forward["smallest w4a4 as trained"], forward["largest w4a4 as trained"]
        ),
        "forward_ms": {name: _ms(times) for name, times in forward.items()},
        "parts": (*parts, Part("stem", None, _ms(stem)), Part("update", None, _ms(update))),
    }


def _ms(seconds: NDArray[np.float64]) -> float:
    return round(1e3 * float(np.median(seconds)), 3)


def _ratio(seconds: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    return round(float(np.median(seconds / reference)), 4)
