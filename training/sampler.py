"""The configuration sampler: p(subnet | device, latency budget, memory budget).

What a subnet costs comes from a table and does not depend on the network's weights, so a penalty on cost cannot act on
them. It acts here: p is trained toward u(subnet) exp(-(dL + lam R) / tau), with u even over genes, dL the loss against
the frozen teacher as predicted from pairs logged in the run (in units of its spread) and R the logarithm of
(mean + z sd) of cost / budget under p where that exceeds 1, for latency and for memory. Divergence, expected dL, mean
and deviation of the costs are exact functions of the layers' logits, so an update needs no samples and no forward pass
of the network.

The logits start from the shape that the solution has (what the predictor says of each choice, less a multiplier times
its cost relative to the budget); a small network that reads the whole table learns multipliers and corrections.

Costs are skewed and the network that reads tables errs a little on devices it never saw: z = 1.64, which is right for a
normal distribution, let 91 % of draws fit in the worst of 72 cells (device, budget, seed), z = 2.3 lets 96 %. A lam of
0.1 is no constraint at all (2 % at tight budgets); from 10 on the penalty outweighs what lies beyond the budget.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dcqfa_ros.bundle.schema import Positive
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.errors import UserError
from training.conditions import RESOURCES, Condition, ConditionBatch, Conditions, condition_batch
from training.draws import Phase, stratified_subnet
from training.predictor import AdvantagePredictor
from training.space import SearchSpace
from training.subnet import Subnet
from training.subnet_distribution import IMPOSSIBLE, DepthGroup, SubnetDistribution

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Above = Annotated[float, Field(gt=0.0)]
MULTIPLIER_RANGE = 8.0  # their logarithms lie between 0 (hardly felt) and this (one choice left at most budgets)
MULTIPLIER_START = 2.25
CORRECTION_RANGE = 8.0  # of logits: what a block does can never be settled for all conditions
STRAIN = (
    1e-3  # weight of the pull back to the start, felt only where the distribution is so narrow that nothing else is
)
TRUSTED_PAIRS = 256
RAMP = 100  # updates over which penalty and rate grow: at full size at once they end in a corner, without entropy


class SamplerError(UserError, ValueError):
    """A sampler state that cannot be used; the message says why."""


class SamplerConfig(StrictModel):
    """How configurations are drawn in a supernet run.

    Attributes:
        kind: ``learned``; ``rejection`` draws ``candidates`` stratified subnets and keeps one with p ~ exp(-R / tau);
            ``uniform`` ignores the condition.
        stratified_share: share of :meth:`ConfigurationSampler.draw_mixed` that ignores the condition, so that every
            subnet is trained.
        tau: temperature, in units of the spread of dL.
        lam: weight of each budget's excess, in the same units.
        deviations: standard deviations above the mean cost that must fit.
        rejection_tau: temperature of ``rejection``, in units of relative excess.
        candidates: draws of ``rejection``.
        batch: conditions per update.
        learning_rate: of Adam.
        hold: updates before the rate begins to fall with the square root of their number.
        average: decay of the averaged weights that draws are made with.
        hidden: width of the network.
        window: pairs that the predictor remembers.
        fit_every: updates between two fits of the predictor.
    """

    kind: Literal["learned", "rejection", "uniform"] = "learned"
    stratified_share: Share = 0.4
    tau: Above = 0.2
    lam: Above = 20.0
    deviations: Annotated[float, Field(ge=0.0)] = 2.3
    rejection_tau: Above = 0.1
    candidates: Positive = 8
    batch: Positive = 32
    learning_rate: Above = 3e-3
    hold: Positive = 300
    average: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    hidden: Positive = 128
    window: Positive = 8192
    fit_every: Positive = 4


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn subnet and whether it was drawn without regard to the condition."""

    subnet: Subnet
    stratified: bool


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """What the network says of B conditions.

    Attributes:
        kept: (B, L, C), of keeping a block with each choice.
        skip: (B, L), of skipping it.
        strain: (B,), how far multipliers and corrections are from where they start, before they are bounded.
    """

    kept: Tensor
    skip: Tensor
    strain: Tensor


class Conditioner(nn.Module):
    """From conditions to logits over every layer's choices.

    Buffers:
        preference: (L, C + 1) float32, predicted loss of each choice in units of tau.
    """

    preference: Tensor

    def __init__(self, blocks: int, choices: int, hidden: int) -> None:
        """Build for ``blocks`` layers of ``choices`` choices each."""
        super().__init__()
        self.blocks, self.choices = blocks, choices
        inputs = RESOURCES * (blocks * choices + 5)
        self.trunk = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.multipliers = nn.Linear(hidden, RESOURCES)
        self.correction = nn.Linear(hidden, blocks * (choices + 1))
        self.base = nn.Parameter(torch.zeros(blocks, choices + 1))
        self.register_buffer("preference", torch.zeros(blocks, choices + 1))
        for layer in (self.multipliers, self.correction):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, batch: ConditionBatch) -> Logits:
        """Read conditions; masks are not applied yet."""
        relative = batch.relative
        mean = batch.fixed + 0.5 * relative.mean(dim=3).sum(dim=2)
        room = (1.0 - batch.least).clamp_min(1e-3)
        facts = [batch.fixed, batch.least.log(), batch.greatest.log(), mean.log(), room.log()]
        # Costs relative to a tight budget are many times those of a wide one; logarithms keep the inputs alike.
        hidden = self.trunk(torch.cat([*facts, (self.blocks * relative).log1p().flatten(1)], dim=1))
        push = self.multipliers(hidden)
        start = math.log(MULTIPLIER_START / (MULTIPLIER_RANGE - MULTIPLIER_START))
        multipliers = MULTIPLIER_RANGE * torch.sigmoid(start + push)
        correction = self.base + self.correction(hidden).view(-1, self.blocks, self.choices + 1)
        logits = CORRECTION_RANGE * torch.tanh(correction / CORRECTION_RANGE) - self.preference
        kept = logits[..., :-1] - torch.einsum("br,brlc->blc", multipliers.exp(), relative)
        strain = push.square().sum(dim=1) + correction.square().mean(dim=(1, 2))
        return Logits(kept, logits[..., -1], strain)


def _depth_group(space: SearchSpace, group: str) -> DepthGroup:
    """A group as the distribution takes it.

    Independent genes are even over the patterns of kept blocks, so nearly all have the depth that most patterns have.
    Where depths come from a list (24, 28 or 32 of 32 blocks) no sampler would ever leave that depth; there the depths
    are weighed to be even, and the patterns of one depth among each other.
    """
    members, counts = space.groups[group], space.depth_choices[group]
    if group not in space.config.depths:
        return DepthGroup(members, counts)
    fixed = sum(block in space.always_kept for block in members)
    patterns = [math.comb(len(members) - fixed, count - fixed) for count in counts]
    return DepthGroup(members, counts, tuple(-math.log(number) for number in patterns))


class ConfigurationSampler:
    """Draws subnets for conditions, learns from paired losses.

    Attributes:
        predictor: of what a subnet loses against the teacher; fitted with every kind of sampler.
        updates: calls of :meth:`update` so far.
    """

    def __init__(self, space: SearchSpace, conditions: Conditions, config: SamplerConfig, seed: int = 0) -> None:
        """Start with an untrained sampler.

        Args:
            space: the search space.
            conditions: what :meth:`update` draws conditions from.
            config: kind and constants.
            seed: of the network's initial weights.
        """
        self.space, self.conditions, self.config = space, conditions, config
        self.predictor = AdvantagePredictor(space, window=config.window)
        index = self.predictor.index
        self._offered = index.offered.sum(dim=1)
        self._groups = [_depth_group(space, group) for group in space.groups]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Conditioner(len(space.shape.blocks), index.count, config.hidden)
        self._averaged = copy.deepcopy(self.network).requires_grad_(False)
        self._parameters: list[Tensor] = list(self.network.parameters())
        self._average: list[Tensor] = list(self._averaged.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.learning_rate, betas=(0.9, 0.99))
        self.updates = 0
        full = Phase()
        self._masks = {full: self._mask(full)}

    def distribution(self, condition: Condition, phase: Phase | None = None) -> SubnetDistribution:
        """What :meth:`draw` of the learned sampler draws from."""
        with torch.no_grad():
            logits = self._averaged(condition_batch(self.space, [condition]))
            return self._distribution(logits, phase or Phase())

    def entropy(self, condition: Condition) -> float:
        """Entropy in nats of what the learned sampler draws from."""
        distribution = self.distribution(condition)
        batch = condition_batch(self.space, [condition])
        return float(distribution.entropy(distribution.moments(batch.relative)))

    def draw(self, condition: Condition, generator: torch.Generator, phase: Phase | None = None) -> Subnet:
        """Draw a subnet of integer precision for a condition.

        Args:
            condition: device and budgets; the uniform sampler ignores them.
            generator: a CPU generator.
            phase: what may vary (default: everything).
        """
        return self.draw_many(condition, generator, 1, phase)[0]

    def draw_many(
        self, condition: Condition, generator: torch.Generator, count: int, phase: Phase | None = None
    ) -> list[Subnet]:
        """Draw ``count`` subnets like :meth:`draw`."""
        phase = phase or Phase()
        if self.config.kind == "learned":
            drawn = self.distribution(condition, phase).sample(generator, count)
            return [self.predictor.index.decode(numbers) for numbers in drawn.tolist()]
        if self.config.kind == "rejection":
            return [self._draw_rejection(condition, generator, phase) for _ in range(count)]
        return [stratified_subnet(self.space, generator, phase, whole_network=False) for _ in range(count)]

    def draw_mixed(self, condition: Condition, generator: torch.Generator, phase: Phase | None = None) -> Draw:
        """Draw a subnet to train: in a share of the cases stratified, any precision, otherwise like :meth:`draw`."""
        if float(torch.rand((), generator=generator)) < self.config.stratified_share:
            return Draw(stratified_subnet(self.space, generator, phase), True)
        return Draw(self.draw(condition, generator, phase), False)

    def observe(self, subnets: Sequence[Subnet], advantages: Sequence[float]) -> None:
        """Log paired losses L(subnet) - L(teacher) of the same batch, noise and time steps.

        Raises:
            AdvantageError: a loss that is not finite.
        """
        self.predictor.observe(subnets, advantages)

    def update(self, generator: torch.Generator) -> dict[str, float]:
        """Fit the predictor to the log and take one step of the sampler on freshly drawn conditions.

        Returns:
            ``predictor_correlation`` (Spearman, recent pairs, predictions made before they were fitted),
            ``predictor_spread``; and for the learned sampler, means over the conditions of the batch: ``loss``,
            ``entropy`` (nats), ``divergence`` (nats, from even genes), ``expected_loss`` (of a draw, predicted),
            ``latency_over_budget``, ``memory_over_budget`` (expected), ``fit_share`` (estimate of draws that keep both
            budgets; low by nature at budgets next to the smallest subnet's cost) and ``excess`` (R, both budgets).
        """
        config = self.config
        fit = self.updates % config.fit_every == 0
        if fit:
            self.predictor.fit()
        spread = self.predictor.spread()
        metrics = {"predictor_correlation": self.predictor.correlation(), "predictor_spread": spread}
        self.updates += 1
        if self.config.kind != "learned":
            return metrics
        # The spread of a fit to a handful of pairs is noise: what it prefers counts as pairs come in.
        scale = min(1.0, self.predictor.observed / TRUSTED_PAIRS) / spread if spread > 0.0 else 0.0
        if fit:
            preference = (self.predictor.preference() * scale / config.tau).float()
            for network in (self.network, self._averaged):
                network.preference.copy_(preference)
        batch = self.conditions.batch(generator, config.batch)
        logits = self.network(batch)
        distribution = self._distribution(logits, Phase())
        moments = distribution.moments(batch.relative)
        mean = batch.fixed + moments.mean
        deviation = (moments.variance + 1e-12).sqrt()
        # The logarithm of what exceeds 1 has the slope of the excess at the budget, without its size far beyond.
        excess = (mean + config.deviations * deviation).clamp_min(1.0).log().sum(dim=1)
        entropy = distribution.entropy(moments)
        divergence = distribution.divergence(moments, entropy, self._offered)
        predicted = self.predictor.expected(distribution.marginals(moments))
        ramp = min(1.0, self.updates / RAMP)
        lam = config.lam * (0.1 + 0.9 * ramp)
        loss = (divergence + (scale * predicted + lam * excess) / config.tau + STRAIN * logits.strain).mean()
        rate = config.learning_rate * ramp * min(1.0, math.sqrt(config.hold / self.updates))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        with torch.no_grad():
            decay = min(config.average, 1.0 - 1.0 / self.updates)
            torch._foreach_lerp_(self._average, self._parameters, 1.0 - decay)
            fit_share = torch.special.ndtr((1.0 - mean) / deviation).amin(dim=1)
            values = {
                "loss": loss.detach(),
                "entropy": entropy.mean(),
                "divergence": divergence.mean(),
                "expected_loss": predicted.mean(),
                "latency_over_budget": mean[:, 0].mean(),
                "memory_over_budget": mean[:, 1].mean(),
                "fit_share": fit_share.mean(),
                "excess": excess.mean(),
            }
        if not math.isfinite(values["loss"]):
            raise SamplerError(
                f"update {self.updates} of the sampler: its loss is {float(values['loss'])}; "
                "lower supernet.sampler.learning_rate"
            )
        return metrics | {name: float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned, as tensors, numbers and plain containers."""
        return {
            "kind": self.config.kind,
            "updates": self.updates,
            "network": {name: value.clone() for name, value in self.network.state_dict().items()},
            "averaged": {name: value.clone() for name, value in self._averaged.state_dict().items()},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "predictor": self.predictor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit.

        Raises:
            SamplerError: the state is of another kind of sampler.
            AdvantageError: it is of another search space.
        """
        if state["kind"] != self.config.kind:
            raise SamplerError(f"sampler state: kind {state['kind']}, the configuration says {self.config.kind}")
        self.predictor.load_state_dict(state["predictor"])
        self.network.load_state_dict(state["network"])
        self._averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.updates = int(state["updates"])

    def _draw_rejection(self, condition: Condition, generator: torch.Generator, phase: Phase) -> Subnet:
        """Pick one of several stratified draws with p ~ exp(-R / tau)."""
        config = self.config
        drawn = [stratified_subnet(self.space, generator, phase, whole_network=False) for _ in range(config.candidates)]
        excess = torch.tensor([condition.excess(subnet) for subnet in drawn], dtype=torch.float64)
        chance = torch.softmax(-excess / config.rejection_tau, dim=0)
        return drawn[int(torch.multinomial(chance, 1, generator=generator))]

    def _distribution(self, logits: Logits, phase: Phase) -> SubnetDistribution:
        if phase not in self._masks:
            self._masks[phase] = self._mask(phase)
        kept_mask, skip_mask, even = self._masks[phase]
        kept = torch.where(kept_mask, logits.kept - even, IMPOSSIBLE)
        return SubnetDistribution(kept, torch.where(skip_mask, logits.skip, IMPOSSIBLE), self._groups)

    def _mask(self, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
        """Which choices (L, C) and skips (L,) a phase allows, and the logarithm (L, 1) of a block's choices."""
        index = self.predictor.index
        _, _, w, a = index.sizes
        allowed = index.offered.clone().view(-1, *index.sizes)
        for block, (heads, mlp) in enumerate(zip(self.space.head_choices, self.space.mlp_choices, strict=True)):
            if not phase.width:
                allowed[block, : len(heads) - 1] = False
                allowed[block, :, : len(mlp) - 1] = False
        if not phase.bits:
            allowed[:, :, :, : w - 1] = False
            allowed[..., : a - 1] = False
        skip = torch.tensor([phase.depth and block not in self.space.always_kept for block in range(len(allowed))])
        return allowed.flatten(1), skip, self._offered.float().log()[:, None]
