"""Training of the full-precision policy by denoising score matching.

Every random draw of a step (batch indices, time steps, noise, dropout) comes from generators seeded by (seed, step), so
a resumed run repeats the uninterrupted one bit for bit without storing generator states.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dcqfa_ros.bundle.provenance import TrainingSegment
from dcqfa_ros.bundle.schema import NormalizerKind
from dcqfa_ros.errors import UserError
from dcqfa_ros.runtime.schedule import alphas_cumprod, squared_cosine_betas
from training.checkpoint import CHECKPOINT, CheckpointError, load_checkpoint, save_checkpoint
from training.config import ConfigError, TrainConfig
from training.data.episodes import DataError, read_demonstrations, split_episodes
from training.data.normalizer import concatenate_normalizers, fit_normalizer, normalize
from training.data.sequences import WindowSet, episode_rows, fit_observation_normalizers
from training.policies.diffusion_policy_t import DiffusionPolicyT
from training.schedules import ema_decay, learning_rate_factor, step_seed
from training.signals import stop_on_signal
from training.specification import PolicyMeaning
from training.trained import segments

VALIDATION_SEED = 20_000_003  # fixed noise and time steps, the same in every validation


class TrainingError(UserError):
    """A run that cannot go on; the last good checkpoint is kept."""


class Trainer:
    """One training run in a folder: ``config.json``, ``checkpoint.pt``, TensorBoard events.

    Attributes:
        step: optimizer steps done.
        history: the starts and resumes of the run so far; :meth:`run` adds one.
        changed: conditions that differ from those the checkpoint was written under, as text; the run then no longer
            repeats an uninterrupted one bit for bit.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        resume: bool = True,
        *,
        change_length: bool = False,
        config_file: str | None = None,
    ) -> None:
        """Read the data, build the network and continue from the folder's checkpoint where there is one.

        Args:
            config: the run.
            folder: where it is kept.
            resume: continue from the folder's checkpoint.
            change_length: continue also where ``run.steps`` differs from the checkpoint's.
            config_file: name, without folder, of the YAML file that ``config`` comes from, for the record.

        Raises:
            DataError: the data set cannot be used or does not fit the policy.
            ConfigError: the configuration does not describe a policy that a bundle can hold, or its action normaliser
                leaves the range that the sampler keeps.
            CheckpointError: the folder's checkpoint is damaged or belongs to another configuration or other data.
        """
        self.config, self.folder, self.config_file = config, folder, config_file
        self.history: list[TrainingSegment] = []
        self.changed: tuple[str, ...] = ()
        torch.set_num_threads(config.run.threads)
        self.device = torch.device(config.run.device)
        demonstrations = read_demonstrations(config.data)
        self.shapes = demonstrations.shapes
        self.data_sha256 = demonstrations.sha256()
        for label, have, want in (
            ("observation_dim", demonstrations.observation.shape[1], config.policy.observation_dim),
            ("action_dim", demonstrations.action.shape[1], config.policy.action_dim),
        ):
            if have != want:
                raise DataError(f"{config.data.path}: the data gives {label} {have}, the policy declares {want}")
        data = config.data
        train, held_out = split_episodes(
            demonstrations.episodes, data.validation_ratio, data.split_seed, data.max_train_episodes
        )
        self.train_episodes = len(train)
        rows = episode_rows(demonstrations, train)
        self.observation_norms = fit_observation_normalizers(demonstrations, rows, config)
        self.action_norm = fit_normalizer(demonstrations.action[rows], data.action.normalizer)
        _check_action_range(normalize(demonstrations.action[rows], self.action_norm), config)
        PolicyMeaning(
            config, self.shapes, self.observation_norms, self.action_norm, self.train_episodes, 0
        ).specification()  # what the bundle would refuse in the end is refused before the first step
        observation_norm = concatenate_normalizers(self.observation_norms, self.shapes)
        self.windows = WindowSet(demonstrations, train, config, observation_norm, self.action_norm)
        self.held_out = WindowSet(demonstrations, held_out, config, observation_norm, self.action_norm)
        if not len(self.windows):
            raise DataError(f"{data.path}: no training window of {config.policy.horizon} steps; episodes are too short")

        torch.manual_seed(config.run.seed)
        self.model = DiffusionPolicyT(config.policy).to(self.device)
        self.forward: Callable[..., Tensor] = torch.compile(self.model) if config.run.compile else self.model
        self.ema = DiffusionPolicyT(config.policy).to(self.device)
        self.ema.load_state_dict(self.model.state_dict())
        self.ema.requires_grad_(False).eval()
        self.parameters = list(self.model.parameters())
        self.weights: list[Tensor] = list(self.parameters)
        self.averaged: list[Tensor] = list(self.ema.parameters())
        opt = config.optimizer
        decay = [p for p in self.parameters if p.ndim == 2]
        plain = [p for p in self.parameters if p.ndim != 2]  # biases, norms and position embeddings are not decayed
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": opt.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=opt.learning_rate,
            betas=opt.betas,
            fused=True,
        )
        abar = alphas_cumprod(squared_cosine_betas(config.diffusion.train_timesteps))
        self.signal = torch.tensor(np.sqrt(abar), dtype=torch.float32, device=self.device)
        self.sigma = torch.tensor(np.sqrt(1.0 - abar), dtype=torch.float32, device=self.device)
        self.step = 0
        if resume and self.checkpoint_path.exists():
            self._restore(load_checkpoint(self.checkpoint_path), change_length)

    @property
    def checkpoint_path(self) -> Path:
        """The run's one checkpoint file."""
        return self.folder / CHECKPOINT

    def _restore(self, payload: dict[str, Any], change_length: bool) -> None:
        try:
            trained = TrainConfig.model_validate_json(json.dumps(payload["config"]), strict=True)
            self.history = list(segments(payload))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.checkpoint_path}: its configuration cannot be read ({error})") from error
        mine, theirs = _identity(self.config), _identity(trained)
        different = sorted(key for key in mine if mine[key] != theirs[key])
        if change_length:
            different = [key for key in different if key != "run.steps"]
        if different:
            length = "; --change-length permits another run.steps" if different == ["run.steps"] else ""
            raise CheckpointError(
                f"{self.checkpoint_path}: trained with another configuration (differs in {', '.join(different)}); "
                f"give another --out or restore the configuration{length}"
            )
        # The configuration says where data are, not what they hold. Checkpoints of older versions lack the hash.
        ours = self._data_facts()
        different = [key for key, value in ours.items() if key in payload and payload[key] != value]
        if different:
            raise CheckpointError(
                f"{self.checkpoint_path}: trained on other data than {self.config.data.path} (differs in "
                f"{', '.join(different)}); give another --out or restore the data"
            )
        self.changed = tuple(
            f"{name} {getattr(trained.run, name)} -> {getattr(self.config.run, name)}"
            for name in ("threads", "compile", "device")
            if getattr(trained.run, name) != getattr(self.config.run, name)
        )
        self.config_file = self.config_file or payload.get("config_file")
        try:
            self.model.load_state_dict(payload["model"])
            self.ema.load_state_dict(payload["ema"])
            self.optimizer.load_state_dict(payload["optimizer"])
            self.step = int(payload["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.checkpoint_path}: its state does not fit the network ({error})") from error

    def _data_facts(self) -> dict[str, Any]:
        """What follows from the data, as a checkpoint holds it."""
        return {
            "data_sha256": self.data_sha256,
            "train_episodes": self.train_episodes,
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "observation_norms": {k: v.model_dump(mode="json") for k, v in self.observation_norms.items()},
            "action_norm": self.action_norm.model_dump(mode="json"),
        }

    def payload(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        return {
            "config": self.config.model_dump(mode="json"),
            "config_file": self.config_file,
            "step": self.step,
            "history": [segment.model_dump(mode="json") for segment in self.history],
            **self._data_facts(),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def save(self) -> None:
        """Write the checkpoint atomically."""
        save_checkpoint(self.checkpoint_path, self.payload())

    def loss(
        self, model: Callable[..., Tensor], observation: Tensor, action: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean squared error of the predicted noise; inputs (B, To, Do), (B, H, Da), (B,), (B, H, Da)."""
        noisy = self.signal[timesteps][:, None, None] * action + self.sigma[timesteps][:, None, None] * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16"):
            predicted = model(noisy, timesteps, observation)
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    def _draw(self, windows: WindowSet, seed: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(windows), (batch,), generator=generator)
        timesteps = torch.randint(self.config.diffusion.train_timesteps, (batch,), generator=generator)
        action = windows.action[index]
        noise = torch.randn(action.shape, generator=generator)
        device = self.device
        return windows.observation[index].to(device), action.to(device), timesteps.to(device), noise.to(device)

    def train_step(self) -> float:
        """One optimizer step; returns the loss.

        Raises:
            TrainingError: loss or gradient is not finite; nothing was updated.
        """
        config, step = self.config, self.step
        seed = step_seed(config.run.seed, step)
        torch.manual_seed(seed)  # dropout
        batch = self._draw(self.windows, seed, config.run.batch)
        self.model.train()
        loss = self.loss(self.forward, *batch)
        value = loss.item()
        if not np.isfinite(value):
            raise self._diverged("loss", value)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip_norm).item()
        if not np.isfinite(norm):
            self.optimizer.zero_grad()
            raise self._diverged("gradient norm", norm)
        opt = config.optimizer
        factor = learning_rate_factor(
            step, opt.warmup_steps, config.run.steps, opt.final_learning_rate / opt.learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = opt.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = ema_decay(step, config.ema.power, config.ema.maximum)
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.weights, 1.0 - decay)
        self.step += 1
        return value

    def _diverged(self, what: str, value: float) -> TrainingError:
        kept = f"the last checkpoint, {self.checkpoint_path}, is kept"
        if not self.checkpoint_path.exists():
            kept = "no checkpoint had been written yet"
        return TrainingError(
            f"step {self.step}: {what} is {value}; nothing was updated and {kept}. "
            "Lower optimizer.learning_rate or check the data"
        )

    @torch.no_grad()
    def validate(self, batches: int = 4) -> float:
        """Held-out denoising loss of the EMA network on fixed draws; NaN when no episode is held out."""
        if not len(self.held_out):
            return float("nan")
        losses = [
            self.loss(self.ema, *self._draw(self.held_out, VALIDATION_SEED + i, 256)).item() for i in range(batches)
        ]
        return float(np.mean(losses))

    def _window(self, losses: list[float]) -> dict[str, float]:
        """Mean of the losses since the last record, which are forgotten, and the learning rate."""
        record = {"loss": float(np.mean(losses)), "lr": float(self.optimizer.param_groups[0]["lr"])}
        losses.clear()
        return record

    def run(self, log: Callable[[dict[str, float]], None] | None = None) -> bool:
        """Train to the end or to Ctrl-C; returns True when the run is complete. Progress goes to stderr.

        The checkpoint is written every ``checkpoint_every`` steps, at the end, and on INT, TERM and HUP.
        """
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
                )
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config.model_dump(mode="json"), indent=1) + "\n")
        recent: list[float] = []
        with stop_on_signal() as stop, tqdm(total=run.steps, initial=self.step, desc="train", mininterval=2.0) as bar:
            while self.step < run.steps and not stop.is_set():
                recent.append(self.train_step())
                bar.update()
                record: dict[str, float] = {}
                if self.step % run.log_every == 0 or self.step == run.steps:  # at the end what is left of a window
                    record = self._window(recent)
                    bar.set_postfix(loss=f"{record['loss']:.4f}")
                if self.step % run.validate_every == 0:
                    record["validation_loss"] = self.validate()
                if record and log:
                    log({"step": float(self.step), **record})
                if self.step % run.checkpoint_every == 0:
                    self.save()
            if recent and log:  # stopped within a window
                log({"step": float(self.step), **self._window(recent)})
            self.save()
        return self.step >= run.steps


def _check_action_range(normalised: NDArray[np.float32], config: TrainConfig) -> None:
    """Refuse actions (N, Da) that the sampler, which clips to ``diffusion.clip_sample``, could never produce.

    Quantile normalisation cuts its outliers on purpose, and min_max fills -1 to 1.
    """
    kind, limit = config.data.action.normalizer, config.diffusion.clip_sample
    if kind not in (NormalizerKind.MEAN_STD, NormalizerKind.IDENTITY):
        return
    reach = float(np.abs(normalised).max())
    if reach > limit:
        raise ConfigError(
            f"training configuration {config.name!r}: data.action.normalizer {kind.value} leaves actions up to "
            f"{reach:.3g}, but diffusion.clip_sample cuts at {limit:g}; use min_max or raise diffusion.clip_sample"
        )


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that continues it: all but paths, texts and bookkeeping."""
    document = config.model_dump(mode="json", exclude={"license": True, "task": True, "data": {"path", "format"}})
    observations = document["data"]["observations"]
    for source in observations.values():
        del source["names"]
    document["data"]["observations"] = list(observations.items())  # their order matters too
    document["run"] = {key: document["run"][key] for key in ("steps", "batch", "seed", "precision")}
    flat: dict[str, Any] = {}
    for section, value in document.items():
        fields = {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        flat.update(fields)
    return flat
