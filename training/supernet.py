"""Training of the device-conditioned, quantization-aware supernet (``algorithms.md`` sections 1 to 4).

A step is a sandwich on one draw of windows, time steps and noise: the largest network in full precision, the largest at
few bits, the smallest, and networks that the configuration sampler draws for a device and its budgets. Every one of
them learns from the task and from the frozen full-precision teacher; what each loses against the teacher on the very
same samples teaches the sampler. The costs of a network come from tables and act on the sampler alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import CheckpointError
from training.compact import COMPACT, averaged_state, sampler_state
from training.conditions import Conditions
from training.config import ConfigError, TrainConfig
from training.data.policy_data import Batch
from training.data.sequences import WindowSet
from training.draws import Phase
from training.held_out import BATCH, BATCHES, held_out_loss
from training.importance import l1_scores, order_by_importance, taylor_scores
from training.losses.sqil import saliency_weights, sqil_loss
from training.moments import load_moments
from training.nn.elastic_policy import clone
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.quant.batchquant import reestimated_ranges
from training.quant.elastic_calibration import calibrate_inputs, calibrate_weights
from training.run import Record, TrainingRun
from training.sampler import ConfigurationSampler
from training.sandwich import Member, held_out_names, search_space, smallest_of
from training.schedules import step_seed
from training.shared_stem import SharedStem
from training.shipped import policy_at_hand
from training.stored_saliency import PART, SALIENCY, StoredSaliency, compute_saliency
from training.subnet import Precision
from training.supernet_config import SupernetConfig
from training.synthetic_tables import synthetic_tensors
from training.tables_at_hand import device_tables
from training.warm_start import read_policy_weights

CALIBRATION_SEED = 30_000_001
SYNTHETIC_SEED = 40_000_001
SUBNET_STREAM = 0x5DEECE66D  # keeps what a step draws of subnets apart from what it draws of windows


class SupernetTrainer(TrainingRun):
    """One supernet training run.

    Attributes:
        space: the search space.
        model: the supernet.
        ema: its exponential moving average, which is what is evaluated and exported.
        teacher: the frozen full-precision policy.
        tables: look-up tables of the devices.
        conditions: devices and budgets.
        sampler: the configuration sampler.
        table: names of the subnets that are validated.
        only: the one subnet that is trained; None where all are.
    """

    loss_name = "loss"
    files = (*TrainingRun.files, SALIENCY, PART)
    other_facts = MappingProxyType({"teacher_sha256": "supernet.warm_start", "tables_sha256": "supernet.tables"})

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        resume: bool = True,
        *,
        change: Collection[str] = (),
        config_file: str | None = None,
    ) -> None:
        """Read data, teacher and tables, order and calibrate the supernet, and continue from a checkpoint if there is.

        Raises:
            ConfigError: the configuration has no ``supernet`` section.
            UserError: data, warm start, tables or space cannot be used; see the modules that read them.
            CheckpointError: the folder's checkpoint is damaged or belongs to another configuration, data or teacher.
        """
        if config.supernet is None:
            raise ConfigError(f"training configuration {config.name!r}: supernet: the section is missing")
        super().__init__(config, folder, config_file=config_file)
        teacher_at = str(policy_at_hand(config.supernet.warm_start))
        self.options: SupernetConfig = config.supernet.model_copy(update={"warm_start": teacher_at})
        for name in ("largest", "low", "smallest", "sampled"):
            field = f"{name}_batch"
            self.world.check_batch(f"supernet.sandwich.{field}", getattr(self.options.sandwich, field))
        self.space = search_space(config)
        self.table = held_out_names(self.space, self.options)
        self.only = None if self.options.only is None else self.space.parse(self.options.only)
        if self.options.only is not None:
            self.table = (self.options.only,)
        weights = read_policy_weights(Path(self.options.warm_start), config.policy)
        weights.check_normalizers(self.data.observation_norms, self.data.action_norm)
        self._teacher_sha256 = weights.sha256
        torch.manual_seed(config.run.seed)
        teacher = DiffusionPolicyT(config.policy)
        teacher.load_state_dict(weights.state)
        self.teacher = teacher.requires_grad_(False).eval().to(self.device)
        self.model = ElasticDiffusionPolicyT(config.policy)
        self.model.load_state_dict(weights.state, strict=False)  # the quantizers' steps are not among them
        if self.options.activations == "batchquant":
            self.model.use_batch_ranges(live=True)
        self.model.to(self.device)
        self._prepare()
        self.tables = device_tables(config, self.space)
        self.conditions = self._read_conditions()
        self.sampler = ConfigurationSampler(self.space, self.conditions, self.options.sampler, config.run.seed)
        if not (resume and self.checkpoint_path.exists()):
            self._order_and_calibrate()
        self.ema = clone(self.model)
        if config.run.compile:
            self.model.compile_parts()
        self.run_teacher: Callable[..., Tensor] = torch.compile(self.teacher) if config.run.compile else self.teacher
        steps = [p for n, p in self.model.named_parameters() if n.endswith("log_step")]
        others = [p for n, p in self.model.named_parameters() if not n.endswith("log_step")]
        self.parameters, self.steps = others, steps
        self.weights: list[Tensor] = list(self.model.parameters())
        self.averaged: list[Tensor] = list(self.ema.parameters())
        opt = config.optimizer
        groups = [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": opt.weight_decay, "lr": opt.learning_rate},
            {"params": [p for p in others if p.ndim != 2], "weight_decay": 0.0, "lr": opt.learning_rate},
            {"params": steps, "weight_decay": 0.0, "lr": self.options.step_learning_rate},
        ]
        self._base_rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(groups, betas=opt.betas, fused=True)
        if resume:
            self.resume(change)
        self._saliency: Tensor | None = None

    # Preparation -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make what another kind of supernet run needs besides, before a checkpoint is read."""

    def _read_conditions(self) -> Conditions:
        """The devices of the run, measured and made up."""
        generator, count = torch.Generator().manual_seed(SYNTHETIC_SEED), self.options.synthetic
        made_up = synthetic_tensors(self.space, generator, count, self.config.diffusion.steps) if count else []
        return Conditions(self.space, self.tables.costs, made_up, self.options.held_out)

    def _calibration_calls(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Arguments of the network for calibration: the same observations at every tenth noise level."""
        levels = np.unique(np.linspace(0, self.config.diffusion.train_timesteps - 1, 11).round().astype(int))
        count = min(self.options.calibration, len(self.windows))
        for position, level in enumerate(levels):
            batch = self.data.draw(self.windows, CALIBRATION_SEED, count)
            other = self.data.draw(self.windows, CALIBRATION_SEED + 1 + position, count)
            timesteps = torch.full((count,), int(level))
            drawn = Batch(batch.observation, batch.action, timesteps, other.noise, batch.index).to(self.device)
            yield self.noisy(drawn), drawn.timesteps, drawn.observation

    def _order_and_calibrate(self) -> None:
        self.model.activate(self.space.largest())
        self.model.eval()
        scores = l1_scores
        if self.options.importance == "taylor":
            batch = self.data.draw(self.windows, CALIBRATION_SEED, self.options.calibration).to(self.device)
            predicted = self.model(self.noisy(batch), batch.timesteps, batch.observation)
            torch.nn.functional.mse_loss(predicted, batch.noise).backward()
            scores = taylor_scores
        for block in self.model.elastic_blocks():
            order_by_importance(block, scores)
        self.model.zero_grad(set_to_none=True)
        calibrate_weights(self.model, self.options.calibration_method)
        calibrate_inputs(self.model, self._calibration_calls(), self.options.calibration_method)

    def saliency(self) -> Tensor:
        """Distillation weights (N,) of the training windows; computed once and kept in the run folder."""
        if self._saliency is None:
            self._find_saliency(lambda: False)
        assert self._saliency is not None
        return self._saliency

    def _ready(self, stop: Event) -> bool:
        if self._saliency is None:
            self._find_saliency(stop.is_set)
        return self._saliency is not None

    def _find_saliency(self, stopped: Callable[[], bool]) -> None:
        values = self._stored_saliency()
        if values is None:
            values = compute_saliency(self, self.teacher, self._saliency_store(), stopped)
        if values is not None:
            self._saliency = saliency_weights(values, self.options.saliency_percentile)

    def _saliency_store(self) -> StoredSaliency:
        # What saliency depends on: data, teacher and seed.
        key = f"{self.data.sha256} {self._teacher_sha256} {self.config.run.seed} {len(self.windows)}"
        return StoredSaliency(self.folder, key, len(self.windows), speaks=self.world.first)

    def _stored_saliency(self) -> Tensor | None:
        return self._saliency_store().read()

    # State -----------------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"teacher_sha256": self._teacher_sha256, "tables_sha256": self.tables.sha256}

    def payload(self) -> dict[str, Any]:
        """Everything a checkpoint holds; the hashes of single tables tell later which ones are others."""
        return super().payload() | {"table_files": dict(self.tables.sha256s)}

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
        }

    def _load_state(self, payload: dict[str, Any]) -> None:
        if "sampler" not in payload:
            raise CheckpointError(f"{self.checkpoint_path}: no supernet's checkpoint; give another --out")
        if COMPACT in payload:  # averaged weights only: moments and the sampler's optimizer start anew
            config = self.config.model_copy(update={"supernet": self.options})
            state = averaged_state(self.checkpoint_path, payload, config)
            self.packed = True
            self.model.load_state_dict(state)
            self.ema.load_state_dict(state)
            self.sampler.load_state_dict(sampler_state(self.checkpoint_path, payload, self.sampler.state_dict()))
            return
        self.model.load_state_dict(payload["model"])
        self.ema.load_state_dict(payload["ema"])
        load_moments(self.optimizer, payload["optimizer"])
        self.sampler.load_state_dict(payload["sampler"])

    # Steps -----------------------------------------------------------------------------------------------------------

    def phase(self) -> Phase:
        """What may vary at this step."""
        progress = self.step / self.config.run.steps
        return Phase(True, progress >= self.options.width_from, progress >= self.options.depth_from)

    def members(self, generator: torch.Generator) -> tuple[list[Member], str]:
        """The networks of this step, and the device that the drawn ones are for."""
        if self.only is not None:
            return [Member("only", self.only, self.options.sandwich.sampled_batch)], ""
        sandwich, phase = self.options.sandwich, self.phase()
        names = list(sandwich.low_shares)
        shares = torch.tensor([sandwich.low_shares[name] for name in names], dtype=torch.float64)
        low = names[int(torch.multinomial(shares, 1, generator=generator))]
        condition = self.conditions.draw(generator)
        members = [
            Member("largest", self.space.largest(), sandwich.largest_batch, sandwich.largest_weight, dropout=True),
            Member(low, self.space.parse(low), sandwich.low_batch, sandwich.low_weight),
            Member("smallest", smallest_of(self.space, phase), sandwich.smallest_batch, sandwich.smallest_weight),
        ]
        for _ in range(sandwich.sampled):
            draw = self.sampler.draw_mixed(condition, generator, phase)
            label = "stratified" if draw.stratified else "sampled"
            members.append(Member(label, draw.subnet, sandwich.sampled_batch, sandwich.sampled_weight))
        return members, condition.name

    def train_step(self) -> Record:
        """One optimizer step; returns what to log.

        Raises:
            TrainingError: a loss or gradient is not finite; nothing was updated.
        """
        seed = step_seed(self.config.run.seed, self.step)
        generator = torch.Generator().manual_seed(seed ^ SUBNET_STREAM)
        members, device = self.members(generator)
        torch.manual_seed(seed + self.world.rank)  # dropout
        weights = self.saliency()
        drawn = self.data.draw(self.windows, seed, max(member.batch for member in members))
        batch = self.world.share(drawn).to(self.device)
        alpha = weights[batch.index.cpu()].to(self.device)
        noisy = self.noisy(batch)
        with torch.no_grad():
            teacher = self.predict(self.run_teacher, noisy, batch).float()
        rows: list[tuple[float, ...]] = []
        whole = sum(member.weight for member in members)
        stem = SharedStem(self.model, self.objective, noisy, batch)
        for member in members:
            rows.append(self._member_step(member, stem, batch, teacher, alpha, member.weight / whole))
        stem.backward()
        means = self.world.mean([value for row in rows for value in row])
        rows = [tuple(means[3 * i : 3 * i + 3]) for i in range(len(members))]
        for member, (total, _, _) in zip(members, rows, strict=True):
            if not np.isfinite(total):
                self.optimizer.zero_grad()
                raise self.diverged(
                    f"the loss of {member.label} ({self.space.name(member.subnet)})", total, len(drawn.index)
                )
        norms = self._update(len(drawn.index))
        record = self._record(members, rows, device) | norms
        record |= self._update_sampler(members, rows, generator)
        self.step += 1
        return record | {"lr": float(self.optimizer.param_groups[0]["lr"])}

    def _update(self, samples: int) -> Record:
        """Clip the gradients of all networks, step and average; returns the gradients' norms.

        Args:
            samples: windows that the step drew.

        Raises:
            TrainingError: a gradient is not finite; nothing was updated.
        """
        config = self.config
        self.world.average_gradients([*self.parameters, *self.steps])
        clip = config.optimizer.clip_norm
        norms = [torch.nn.utils.clip_grad_norm_(group, clip).item() for group in (self.parameters, self.steps)]
        if not np.isfinite(norms).all():
            self.optimizer.zero_grad()
            raise self.diverged("gradient norm", float(np.max(norms)), samples)
        factor = self.learning_rate_factor()
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average(self.averaged, self.weights)
        return {"norm": norms[0], "step_norm": norms[1]}

    def _member_step(
        self, member: Member, stem: SharedStem, batch: Batch, teacher: Tensor, alpha: Tensor, share: float
    ) -> tuple[float, float, float]:
        """Forward and backward of one network; returns its loss, task loss and paired loss against the teacher."""
        part = batch.first(member.batch // self.world.size)
        size = len(part.index)
        self.model.activate(member.subnet)
        self.model.train(member.dropout)
        predicted = stem.predict(size)
        total, task, distillation = sqil_loss(predicted, teacher[:size], part.noise, alpha[:size])
        if self.options.distillation != 1.0:
            total = task + self.options.distillation * distillation
        (share * total).backward()
        reference = torch.nn.functional.mse_loss(teacher[:size], part.noise)
        return total.item(), task.item(), task.item() - reference.item()

    def _record(self, members: list[Member], rows: list[tuple[float, ...]], device: str) -> Record:
        whole = sum(member.weight for member in members)  # what is minimised
        record: Record = {"loss": sum(m.weight / whole * row[0] for m, row in zip(members, rows, strict=True))}
        for label in dict.fromkeys(member.label for member in members):
            alike = [row for member, row in zip(members, rows, strict=True) if member.label == label]
            record[f"loss/{label}"] = sum(row[0] for row in alike) / len(alike)
            record[f"task/{label}"] = sum(row[1] for row in alike) / len(alike)
            if label == "sampled":
                known = device if device in self.conditions.measured else "synthetic"
                record[f"device_loss/{known}"] = record["loss/sampled"]
        return record

    def _update_sampler(
        self, members: list[Member], rows: list[tuple[float, ...]], generator: torch.Generator
    ) -> Record:
        if self.only is not None:
            return {}
        integer = [(m, row[2]) for m, row in zip(members, rows, strict=True) if m.subnet.precision is Precision.INT]
        self.sampler.observe([member.subnet for member, _ in integer], [advantage for _, advantage in integer])
        return {f"sampler/{name}": value for name, value in self.sampler.update(generator).items()}

    def _step(self) -> Record:
        return self.train_step()

    def held_out_loss(
        self,
        network: Callable[..., Tensor],
        batches: int = BATCHES,
        size: int = BATCH,
        windows: WindowSet | None = None,
    ) -> float:
        """Denoising loss of a network on fixed draws of the held-out windows; NaN when no episode is held out."""
        return held_out_loss(
            network, self.objective, self.data, windows=windows, batches=batches, size=size, world=self.world
        )

    def validate(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Held-out loss of the teacher and of the averaged supernet at some subnets (default: ``table``), by name."""
        losses = {"teacher": self.held_out_loss(self.teacher)}
        for name in self.table if names is None else names:
            self.ema.activate(self.space.parse(name))
            if self.ema.batch_ranges:
                with reestimated_ranges(self.ema), torch.no_grad():
                    for arguments in self._calibration_calls():
                        self.ema(*arguments)
            losses[name] = self.held_out_loss(self.ema)
        return losses

    def _validation(self) -> Record:
        return {f"held_out/{name}": loss for name, loss in self.validate().items()}
