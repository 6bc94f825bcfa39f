"""What every training run has: a folder, a checkpoint it continues from bit for bit, a loop that can be stopped.

Every random draw of a step comes from generators seeded by (seed, step), so a resumed run repeats the uninterrupted one
without storing generator states.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dcqfa_ros.bundle.provenance import TrainingSegment
from dcqfa_ros.errors import UserError
from training.allocator import keep_freed_memory
from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint, remove_leftovers, save_checkpoint
from training.compiling import check_compiler
from training.config import ConfigError, TrainConfig
from training.data.policy_data import Batch, PolicyData
from training.digest import digest
from training.divergence import culprits
from training.files import write_atomically
from training.identity import CHANGEABLE, changes, identity
from training.locks import only_user
from training.messages import warn
from training.objective import Objective
from training.schedules import ema_decay, learning_rate_factor
from training.signals import stop_on_signal
from training.specification import PolicyMeaning
from training.trained import segments
from training.world import World

Record = dict[str, float]
CONFIG = "config.json"
LARGEST_WEIGHT = 1e6  # beyond it, and where it is no number, a network has diverged


class TrainingError(UserError):
    """A run that cannot go on; the last good checkpoint is kept."""


class TrainingRun(ABC):
    """One training run in a folder: ``config.json``, ``checkpoint.pt``, TensorBoard events.

    Attributes:
        step: optimizer steps done.
        history: the starts and resumes of the run so far; :meth:`run` adds one.
        changed: conditions that differ from those the checkpoint was written under, as text; the run then no longer
            repeats an uninterrupted one bit for bit.
        packed: whether the checkpoint in the folder is one of ``dcqfa pack``.
        data: the demonstrations.
        objective: the task.
        world: this process among those that train together.
        weights, averaged: the trained parameters, and their moving averages.
    """

    weights: list[Tensor]
    averaged: list[Tensor]
    loss_name = "loss"
    files: tuple[str, ...] = (CHECKPOINT, CONFIG)
    """Files of the folder that are written through temporary ones, which a kill leaves behind."""
    other_facts: Mapping[str, str] = MappingProxyType({})
    """Entries of :meth:`_facts` that do not follow from the data, with the configuration's field behind each."""

    def __init__(self, config: TrainConfig, folder: Path, *, config_file: str | None = None) -> None:
        """Read the data.

        Args:
            config: the run.
            folder: where it is kept.
            config_file: name, without folder, of the YAML file that ``config`` comes from, for the record.

        Raises:
            DataError: the data set cannot be used or does not fit the policy.
            ConfigError: the configuration does not describe a policy that a bundle can hold, or its action normaliser
                leaves the range that the sampler keeps, or PyTorch finds no device of the kind asked for.
            CompilerError: compilation for a CPU is asked for and there is no C++ compiler.
        """
        self.config, self.folder, self.config_file = config, folder, config_file
        self.history: list[TrainingSegment] = []
        self.changed: tuple[str, ...] = ()
        self.packed = False
        self.step = 0
        self._stored: int | None = None  # step of the checkpoint in the folder; None where there is none
        if config.run.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"training configuration {config.name!r}: run.device: cuda is asked for, but PyTorch finds no CUDA "
                "device; use cpu (--device cpu)"
            )
        if config.run.compile and config.run.device == "cpu":
            check_compiler()
        torch.set_num_threads(config.run.threads)
        self.world = World()
        self.device = self.world.device(config.run.device)
        self.data = PolicyData(config)
        keep_freed_memory()  # only now: what reading took at its peak need not stay
        PolicyMeaning(
            config,
            self.data.shapes,
            self.data.observation_norms,
            self.data.action_norm,
            self.data.train_episodes,
            0,
        ).specification()  # what the bundle would refuse in the end is refused before the first step
        self.windows, self.held_out = self.data.windows, self.data.held_out
        self.objective = Objective(config, self.device)
        self.signal, self.sigma = self.objective.signal, self.objective.sigma

    # What a kind of run fills in -------------------------------------------------------------------------------------

    @abstractmethod
    def _step(self) -> Record:
        """Do one optimizer step and return what to log; the key ``loss_name`` is shown to the user."""

    def _ready(self, stop: Event) -> bool:  # noqa: ARG002  for those who override it
        """Do what precedes the first step and takes long; False where ``stop`` ended it, what was done is kept."""
        return True

    @abstractmethod
    def _validation(self) -> Record:
        """Held-out figures of the averaged network."""

    def validate_prefixes(self) -> dict[int, float]:
        """Held-out losses by the number of leading action tokens known; empty where the policy takes none."""
        return {}

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What the checkpoint holds of networks and optimizer."""

    @abstractmethod
    def _load_state(self, payload: dict[str, Any]) -> None:
        """Continue from :meth:`_state`."""

    def _facts(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that continues it, besides the configuration."""
        return self.data.facts()

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        """The run's one checkpoint file."""
        return self.folder / CHECKPOINT

    def resume(self, change: Collection[str] = ()) -> None:
        """Continue from the folder's checkpoint where there is one.

        Args:
            change: fields of :data:`CHANGEABLE` that may differ from the checkpoint's.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another configuration or other data.
        """
        others = set(change) - CHANGEABLE.keys()
        if others:
            raise ValueError(f"change: expected some of {', '.join(CHANGEABLE)}, got {', '.join(sorted(others))}")
        if self.checkpoint_path.exists():
            self._restore(load_checkpoint(self.checkpoint_path), change)

    def _restore(self, payload: dict[str, Any], change: Collection[str]) -> None:
        try:
            trained = TrainConfig.model_validate_json(json.dumps(payload["config"]), strict=True)
            self.history = list(segments(payload))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.checkpoint_path}: its configuration cannot be read ({error})") from error
        mine, theirs = identity(self.config), identity(trained)
        different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        changed = [key for key in different if key in change]
        different = [key for key in different if key not in change]
        if different:
            hint = ""
            if all(key in CHANGEABLE for key in different):
                hint = "".join(f"; {CHANGEABLE[key]} permits another {key}" for key in different)
            raise CheckpointError(
                f"{self.checkpoint_path}: trained with another configuration (differs in {', '.join(different)}); "
                f"give another --out or restore the configuration{hint}"
            )
        # The configuration says where data are, not what they hold. Checkpoints of older versions lack the hash.
        ours = self._facts()
        different = [key for key, value in ours.items() if key in payload and payload[key] != value]
        other_files = {self.other_facts[name]: name for name in different if name in self.other_facts}
        refused = sorted(field for field in other_files if field not in change)
        if refused:
            hint = "".join(f"; {CHANGEABLE[field]} permits other {field}" for field in refused if field in CHANGEABLE)
            raise CheckpointError(
                f"{self.checkpoint_path}: trained with other files than {' and '.join(refused)} names now (differs in "
                f"{', '.join(sorted(other_files[field] for field in refused))}); give another --out or restore "
                f"them{hint}"
            )
        different = [name for name in different if name not in self.other_facts]
        if different:
            raise CheckpointError(
                f"{self.checkpoint_path}: trained on other data than {self.config.data.path} (differs in "
                f"{', '.join(different)}); give another --out or restore the data"
            )
        self.changed = changes((name for name in changed if name != "run.steps"), theirs, mine)
        self.changed += tuple(
            f"{name} {getattr(trained.run, name)} -> {getattr(self.config.run, name)}"
            for name in ("threads", "compile", "device")
            if getattr(trained.run, name) != getattr(self.config.run, name)
        )
        self.changed += tuple(f"{field} names other files" for field in sorted(other_files))
        before = int(payload.get("processes", 1))
        if before != self.world.size:
            self.changed += (f"processes {before} -> {self.world.size}",)
        self.config_file = self.config_file or payload.get("config_file")
        try:
            self._load_state(payload)
            self.step = self._stored = int(payload["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.checkpoint_path}: its state does not fit the network ({error})") from error

    def payload(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        return {
            "config": self.config.model_dump(mode="json"),
            "config_file": self.config_file,
            "step": self.step,
            "processes": self.world.size,
            "history": [segment.model_dump(mode="json") for segment in self.history],
            **self._facts(),
            **self._state(),
        }

    def save(self) -> None:
        """Write the checkpoint atomically (the first process only).

        Raises:
            CheckpointError: the disk refuses; the previous file is untouched.
            TrainingError: the weights have diverged.
        """
        self._check_weights()
        if self.world.first:
            save_checkpoint(self.checkpoint_path, self.payload())
        self.world.wait()
        self._stored, self.packed = self.step, False

    def save_new(self) -> None:
        """Write the checkpoint where a step was done since it was last read or written."""
        if self.step != self._stored:
            self.save()

    # Steps -----------------------------------------------------------------------------------------------------------

    def noisy(self, batch: Batch) -> Tensor:
        """Actions (B, H, Da) with noise of their time steps."""
        return self.objective.noisy(batch)

    def predict(self, model: Callable[..., Tensor], noisy: Tensor, batch: Batch) -> Tensor:
        """Noise (B, H, Da) that ``model`` predicts, in the run's precision."""
        return self.objective.predict(model, noisy, batch)

    def learning_rate_factor(self) -> float:
        """Share of the base learning rate at this step."""
        opt, steps = self.config.optimizer, self.config.run.steps
        return learning_rate_factor(self.step, opt.warmup_steps, steps, opt.final_learning_rate / opt.learning_rate)

    def average(self, averaged: list[Tensor], weights: list[Tensor]) -> None:
        """Move the averaged parameters toward the trained ones."""
        decay = ema_decay(self.step, self.config.ema.power, self.config.ema.maximum)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1.0 - decay)

    def diverged(self, what: str, value: float, samples: int) -> TrainingError:
        """The error of a step whose loss or gradient is not finite; every process has to ask.

        Args:
            what: what is not finite.
            value: what it is.
            samples: windows that the step drew.
        """
        blamed, data = culprits(self.data, self.world, self.config.run.seed, self.step, samples)
        advice = "Mend these data and give another --out" if data else self._lower_rate()
        return TrainingError(
            f"step {self.step}: {what} is {value}; nothing was updated and {self._kept()}. {blamed}. {advice}"
        )

    def _kept(self) -> str:
        if self.checkpoint_path.exists():
            return f"the last checkpoint, {self.checkpoint_path}, is kept"
        return "no checkpoint had been written yet"

    def _lower_rate(self) -> str:
        advice = "Lower optimizer.learning_rate: train anew with it and another --out"
        if self.checkpoint_path.exists():
            advice += (
                f", or go on from the checkpoint with it and {CHANGEABLE['optimizer.learning_rate']} (its weights may "
                "have grown too large already: then this comes again, and only another --out helps)"
            )
        return advice

    def _check_weights(self) -> None:
        """Refuse to replace a good checkpoint by weights that have diverged already, though no loss has shown it."""
        largest = torch.stack(torch._foreach_norm([*self.weights, *self.averaged], float("inf"))).max().item()
        if not largest <= LARGEST_WEIGHT:
            raise TrainingError(
                f"step {self.step}: the weights have diverged, up to {largest:.3g}; they were not written and "
                f"{self._kept()}. {self._lower_rate()}"
            )

    def run(self, log: Callable[[Record], None] | None = None) -> bool:
        """Train to the end or to Ctrl-C; returns True when the run is complete. Progress goes to stderr.

        The checkpoint is written every ``checkpoint_every`` steps, at the end, and on INT, TERM and HUP.

        Raises:
            TrainingError: another process trains in the folder, it cannot be made, or a loss is not finite.
            WorldError: processes that train together start from different states.
        """
        if self.world.size > 1:
            parts = {"configuration": identity(self.config), "data": self._facts(), **self._state()}
            facts = {"step": str(self.step)} | {name: digest(part) for name, part in parts.items()}
            self.world.check_same(facts, self.folder)
        lock = only_user(self.folder, "training", TrainingError) if self.world.first else nullcontext()
        with lock, stop_on_signal() as stop:
            if self.world.first:
                remove_leftovers(self.folder, self.files)
            return self._run(stop, log)

    def _run(self, stop: Event, log: Callable[[Record], None] | None) -> bool:
        run = self.config.run
        if self.step < run.steps:
            self.history.append(
                TrainingSegment(
                    step=self.step,
                    planned_steps=run.steps,
                    threads=run.threads,
                    compile=run.compile,
                    device=run.device,
                    torch=str(torch.__version__),
                    changed=self.changed,
                )
            )
        if self.world.first and (self.step < run.steps or self._stored is None):
            if self.packed:
                warn(
                    f"{self.checkpoint_path}: is packed; the next save replaces it by a whole checkpoint, some twenty "
                    "times as large. To keep it, stop now and train on a copy of its folder (--out)"
                )
            text = json.dumps(self.config.model_dump(mode="json"), indent=1) + "\n"
            write_atomically(self.folder / CONFIG, text.encode())
        ready = self.step >= run.steps or self._ready(stop)
        recent = _Window()
        bar = tqdm(total=run.steps, initial=self.step, desc="train", mininterval=2.0, disable=not self.world.first)
        with bar:
            while ready and self.step < run.steps and not self.world.any(stop.is_set()):
                recent.add(self._step())
                bar.update()
                record: Record = {}
                if self.step % run.log_every == 0 or self.step == run.steps:  # at the end what is left of a window
                    record = recent.take()
                    bar.set_postfix(loss=f"{record[self.loss_name]:.4f}")
                if self.step % run.validate_every == 0:
                    record |= self._validation()
                if record and log:
                    log({"step": float(self.step), **record})
                if self.step % run.checkpoint_every == 0:
                    self.save()
            if recent and log:  # stopped within a window
                log({"step": float(self.step), **recent.take()})
            self.save_new()
        return self.step >= run.steps


class _Window:
    """Means of what steps report; a figure that only some steps have is averaged over those."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, record: Record) -> None:
        for name, value in record.items():
            self._values[name].append(value)

    def take(self) -> Record:
        """Return the means and forget them; the learning rate is the last one."""
        record = {k: float(v[-1] if k == "lr" else np.mean(v)) for k, v in self._values.items()}
        self._values.clear()
        return record
