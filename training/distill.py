"""Multi-step on-policy distillation of a trained supernet (``algorithms.md`` section 6).

Every ``collect_every`` steps the averaged networks visit states in closed loop; every step learns from a batch of
demonstrations (the supernet's own loss) and, one to one, from a batch of visited states, at which the frozen
full-precision teacher says what it would predict. The control learns in the same way from states of the demonstrations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import CheckpointError
from training.compact import COMPACT
from training.config import ConfigError
from training.distill_buffer import StateBuffer
from training.distill_config import DistillConfig
from training.files import write_atomically
from training.losses.sqil import sqil_loss
from training.messages import warn
from training.rollouts_group import GroupRunner, Job, Kit, RolloutError, Visited, flat_state
from training.rollouts_workers import Workers, open_workers
from training.run import Record
from training.sandwich import Member
from training.schedules import step_seed
from training.shared_stem import SharedStem
from training.specification import PolicyMeaning
from training.stored_saliency import StoredSaliency
from training.subnet import FLOAT_BITS, Precision, SpaceError, Subnet
from training.supernet import SUBNET_STREAM, SupernetTrainer
from training.supernet_checkpoint import TrainedSupernet, load_supernet
from training.warm_start import state_sha256
from training.world import WorldError

LOG = "log.jsonl"
ROUND_STREAM = 0x2545F491  # keeps what a round draws apart from what steps draw
VISIT_STREAM = 0x9E3779B9


class DistillTrainer(SupernetTrainer):
    """One run of distillation, on visited states or, as the control, on states of the demonstrations.

    Attributes:
        start: the supernet that is trained on.
        buffer: states that were visited.
        teacher_calls: chunks that the teacher was asked for in rounds so far.
    """

    files = (*SupernetTrainer.files, LOG)
    other_facts = MappingProxyType({**SupernetTrainer.other_facts, "start_sha256": "distill.start"})

    def _order_and_calibrate(self) -> None:
        """Take the start's weights in place of an ordered and calibrated full-precision policy, and its sampler."""
        self.model.load_state_dict(self.start.network.state_dict())
        self.sampler.load_state_dict(self.start.sampler(self.sampler.state_dict()))

    def _prepare(self) -> None:
        config = self.config
        if config.distill is None:
            raise ConfigError(f"training configuration {config.name!r}: distill: the section is missing")
        self.distill: DistillConfig = config.distill
        if self.options.activations == "batchquant":
            raise ConfigError(
                f"training configuration {config.name!r}: supernet.activations: batchquant estimates ranges for every "
                "network, and those that drive rollouts have none; distil a supernet of learned steps"
            )
        if self.world.size > 1:
            raise WorldError(
                "distill: runs in one process, whose rollouts use every core (distill.workers); start it without "
                "torchrun"
            )
        self.start: TrainedSupernet = load_supernet(Path(self.distill.start))
        self._check_start()
        try:
            self._low = self.space.parse(self.distill.low)
        except SpaceError as error:
            raise ConfigError(f"training configuration {config.name!r}: distill.low: {error}") from error
        self._start_sha256 = state_sha256(self.start.network.state_dict())
        runner = GroupRunner(self._kit())  # refuses here, and not in a worker, a policy that cannot be rolled out
        self.buffer = StateBuffer(self.distill.buffer, runner.timesteps)
        self.teacher_calls = 0
        self._workers: Workers | None = None

    def _check_start(self) -> None:
        theirs, field = self.start.meaning.config, f"distill.start {self.start.path}"
        assert theirs.supernet is not None
        for name, same in (
            ("policy", theirs.policy == self.config.policy),
            ("executed_actions", theirs.executed_actions == self.config.executed_actions),
            ("diffusion.train_timesteps", theirs.diffusion.train_timesteps == self.config.diffusion.train_timesteps),
            ("supernet.space", theirs.supernet.space == self.options.space),
            ("supernet.activations", theirs.supernet.activations == self.options.activations),
        ):
            if not same:
                raise ConfigError(
                    f"training configuration {self.config.name!r}: {field}: its {name} is another one; take over its "
                    "section or start from another supernet"
                )
        known = self.start.teacher_sha256
        if known is not None and known != self._teacher_sha256:
            raise ConfigError(
                f"training configuration {self.config.name!r}: {field}: was trained from another full-precision policy "
                "than supernet.warm_start names, which is the teacher; name that one"
            )
        norms = self.start.meaning.observation_norms, self.start.meaning.action_norm
        if norms != (self.data.observation_norms, self.data.action_norm):
            raise ConfigError(
                f"training configuration {self.config.name!r}: {field}: was trained in other units than data.path "
                "gives; use the demonstrations that it was trained on"
            )

    def _kit(self) -> Kit:
        meaning = PolicyMeaning(self.config, self.data.shapes, self.data.observation_norms, self.data.action_norm, 1, 1)
        return Kit(
            self.config.policy,
            meaning.specification(),
            self.distill.denoising_steps,
            {name: value.cpu().numpy() for name, value in self.teacher.state_dict().items()},
            self.config.run.precision == "bf16",
        )

    # State -----------------------------------------------------------------------------------------------------------

    def _stored_saliency(self) -> Tensor | None:
        """Saliency of this run or, as data and teacher are the same, of the run that is continued from."""
        store = self._saliency_store()
        values = store.read()
        if values is None:
            values = StoredSaliency(self.start.path.parent, store.key, store.count).read()
            if values is not None:
                store.write(values)
        return values

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"start_sha256": self._start_sha256}

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"buffer": self.buffer.state_dict(), "teacher_calls": self.teacher_calls}

    def _load_state(self, payload: dict[str, Any]) -> None:
        if "buffer" not in payload:
            if COMPACT in payload:
                raise CheckpointError(
                    f"{self.checkpoint_path}: is packed, without the visited states that a distillation goes on with; "
                    "continue the whole checkpoint, or give another --out and this one as distill.start"
                )
            raise CheckpointError(f"{self.checkpoint_path}: no checkpoint of a distillation; give another --out")
        super()._load_state(payload)
        self.buffer.load_state_dict(payload["buffer"])
        self.teacher_calls = int(payload["teacher_calls"])

    # Rounds ----------------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.step / self.config.run.steps

    def weight(self) -> float:
        """Weight of the loss on visited states at this step."""
        return self.distill.weight * min(1.0, (self.step + 1) / max(1, self.distill.warmup_steps))

    def driver(self, generator: torch.Generator) -> Subnet:
        """Draw the network that drives a group: biased to few bits, and for a device drawn anew."""
        low = float(torch.rand((), generator=generator)) < self.distill.low_share
        condition = self.conditions.draw(generator)
        drawn = [self.sampler.draw_mixed(condition, generator).subnet for _ in range(self.distill.candidates)]
        if self.only is not None:
            return self.only
        return self._low if low else min(drawn, key=_mean_bits)

    def jobs(self) -> list[Job]:
        """The groups of the round that is due at this step: a function of seed and step alone."""
        options, seed = self.distill, step_seed(self.config.run.seed, self.step) ^ ROUND_STREAM
        generator = torch.Generator().manual_seed(seed)
        count, calls = options.worlds // options.groups, options.calls
        acts, asked = options.teacher_acts(self.progress), float(options.path_share < 1.0) * 0.5
        observation = self.windows.observation
        assert isinstance(observation, Tensor)
        jobs = []
        for group in range(options.groups):
            driver = self.driver(generator)
            index = torch.randint(len(self.windows), (calls, count), generator=generator)
            uniform = torch.rand((2, calls, count), generator=generator)
            ask = uniform[1] < asked
            ask[0, 0] = asked > 0.0  # at least one, whatever is drawn
            jobs.append(
                Job(
                    subnet=driver,
                    starts=observation[index].numpy(),
                    horizon=options.horizon(self.progress),
                    closed=options.states == "rollouts",
                    seeds=tuple(range(group * count, (group + 1) * count)),
                    first_call=self.step * calls,
                    teacher_acts=(uniform[0] < acts).numpy(),
                    teacher_asked=ask.numpy(),
                )
            )
        return jobs

    def _open_workers(self) -> Workers:
        if self._workers is None:
            self._workers = open_workers(self._kit(), self.distill.groups, self.distill.workers, self.distill.ray)
        return self._workers

    def collect(self) -> Record:
        """Do the round that is due: roll the averaged networks out and keep what they visit."""
        started = time.monotonic()
        jobs = self.jobs()
        visited = Visited.join(self._open_workers().run(flat_state(self.ema), jobs))
        self.buffer.add(visited)
        self.teacher_calls += visited.teacher_calls
        return {
            "rollouts/seconds": time.monotonic() - started,
            "rollouts/states": float(self.buffer.count),
            "rollouts/horizon": float(jobs[0].horizon),
            "rollouts/teacher_acts": self.distill.teacher_acts(self.progress),
            "rollouts/teacher_calls": float(self.teacher_calls),
            "rollouts/restarts": float(visited.restarts),
        }

    # Steps -----------------------------------------------------------------------------------------------------------

    def train_step(self) -> Record:
        """One optimizer step; returns what to log.

        Raises:
            TrainingError: a loss or gradient is not finite; nothing was updated.
            RolloutError: a round could not be collected.
        """
        config, seed = self.config, step_seed(self.config.run.seed, self.step)
        gathered = self.collect() if self.step % self.distill.collect_every == 0 else {}
        generator = torch.Generator().manual_seed(seed ^ SUBNET_STREAM)
        members, _ = self.members(generator)
        torch.manual_seed(seed)  # dropout
        weights, size = self.saliency(), max(member.batch for member in members)
        batch = self.data.draw(self.windows, seed, size).to(self.device)
        alpha = weights[batch.index.cpu()].to(self.device)
        visited = self.buffer.draw(
            size,
            self.distill.path_share,
            self.objective,
            config.diffusion.levels,
            torch.Generator().manual_seed(seed ^ VISIT_STREAM),
        ).to(self.device)
        noisy = self.noisy(batch)
        with torch.no_grad():
            teacher = self.predict(self.run_teacher, noisy, batch).float()
            answer = self.predict(self.run_teacher, visited.action, visited).float()
        stem = SharedStem(self.model, self.objective, noisy, batch)
        second = SharedStem(self.model, self.objective, visited.action, visited)
        weight, whole = self.weight(), sum(member.weight for member in members)
        rows = []
        for member in members:
            n = len(batch.first(member.batch).index)
            self.model.activate(member.subnet)
            self.model.train(member.dropout)
            _, task, distance = sqil_loss(stem.predict(n), teacher[:n], batch.noise[:n], alpha[:n])
            opd = torch.nn.functional.mse_loss(second.predict(n), answer[:n])
            total = task + self.options.distillation * distance + weight * opd
            (member.weight / whole * total).backward()
            rows.append((total.item(), task.item(), opd.item()))
        stem.backward()
        second.backward()
        for member, row in zip(members, rows, strict=True):
            if not np.isfinite(row[0]):
                self.optimizer.zero_grad()
                raise self.diverged(f"the loss of {member.label} ({self.space.name(member.subnet)})", row[0], size)
        norms = self._update(size)
        record = self._distill_record(members, rows) | norms | gathered
        record |= {"rollouts/weight": weight}
        self.step += 1
        return record | {"lr": float(self.optimizer.param_groups[0]["lr"])}

    def _distill_record(self, members: list[Member], rows: list[tuple[float, float, float]]) -> Record:
        whole = sum(member.weight for member in members)
        record: Record = {"loss": sum(m.weight / whole * row[0] for m, row in zip(members, rows, strict=True))}
        for member, (total, task, opd) in zip(members, rows, strict=True):
            record |= {f"loss/{member.label}": total, f"task/{member.label}": task, f"opd/{member.label}": opd}
        return record

    def run(self, log: Callable[[Record], None] | None = None) -> bool:
        """Train to the end or to Ctrl-C, see :meth:`TrainingRun.run`; every record is a line of ``log.jsonl`` too.

        Raises:
            UserError: ``distill.ray`` is no address, or Ray is not installed; nothing was written. Or a step failed.
            RolloutError: a round could not be collected; the checkpoint is of the step before it.
        """
        self._open_workers()  # starts nothing, but knows the address of a cluster from what is none
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOG
        if path.exists():
            text = "".join(f"{line}\n" for line in _lines(path) if json.loads(line)["step"] <= self.step)
            if text != path.read_text():
                write_atomically(path, text.encode())

        refused = False

        def write(record: Record) -> None:
            nonlocal refused
            try:
                if not refused:  # after a torn line nothing can follow
                    with path.open("a") as file:
                        file.write(json.dumps(record) + "\n")
            except OSError as error:
                refused = True
                warn(
                    f"{path}: cannot be written ({error.strerror}); training goes on without it. Free disk space, then "
                    "stop with Ctrl-C and run the same command again"
                )
            if log is not None:
                log(record)

        try:
            return super().run(write)
        except RolloutError:
            if self.step:
                self.save_new()  # a round comes first in a step: nothing of it was done
            raise
        finally:
            self.close()

    def close(self) -> None:
        """End the workers; the next round starts new ones."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def _mean_bits(subnet: Subnet) -> float:
    """Mean of weight and activation bits over the blocks kept."""
    if subnet.precision is not Precision.INT:
        return float(FLOAT_BITS[subnet.precision])
    layers = [layer for layer in subnet.layers if layer is not None]
    return sum(layer.w + layer.a for layer in layers) / (2 * len(layers))


def _lines(path: Path) -> list[str]:
    """Whole records of an earlier part of the run; a last line that a crash cut short is left out."""
    lines = path.read_text().splitlines()
    return [line for line in lines if line.startswith("{") and line.endswith("}")]
