"""A distribution over subnets with independent layers, of which everything is known in closed form.

A block is kept or skipped, and a kept block makes one of C choices (heads, MLP width, weight bits, activation bits).
Blocks are independent but for one condition: every group keeps one of its numbers of blocks. It is met exactly, by a
recursion over the number of blocks kept, so the distribution never has to be drawn from again until it fits, and
moments of additive costs, marginals and entropy stay exact and differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMPOSSIBLE = -1e30  # a logarithm of zero whose gradients are finite


@dataclass(frozen=True, slots=True)
class DepthGroup:
    """Blocks of which one of ``counts`` is kept.

    Attributes:
        members: indices of the blocks, ascending.
        counts: numbers of blocks that may be kept, ascending, each 0 to the number of members.
        log_weights: of each of ``counts``, by which subnets of that depth are likelier than independent blocks make
            them; None for no difference.
    """

    members: tuple[int, ...]
    counts: tuple[int, ...]
    log_weights: tuple[float, ...] | None = None

    def weighed(self, log_counts: Tensor) -> Tensor:
        """Logarithms (..., len(counts)) of the shares of ``counts`` from those (..., members + 1) of all numbers."""
        allowed = log_counts[..., list(self.counts)]
        return allowed if self.log_weights is None else allowed + allowed.new_tensor(self.log_weights)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Additive costs under the distribution.

    Attributes:
        mean: (B, R).
        variance: (B, R).
        kept: (B, L) probability that a block is kept.
        log_norm: (B,) logarithm of the probability, were blocks wholly independent, that every group has one of its
            counts, each probability times the weight of the count.
        log_weight: (B,) expected logarithm of the weights of the counts, summed over groups.
    """

    mean: Tensor
    variance: Tensor
    kept: Tensor
    log_norm: Tensor
    log_weight: Tensor


class SubnetDistribution:
    """B distributions over subnets of L blocks with C choices each.

    Attributes:
        keep: (B, L) float64, logarithm of the probability to keep a block before the condition on the depth.
        skip: (B, L) float64, of the probability to skip it.
        choice: (B, L, C) float64, log-probabilities of a kept block's choices.
    """

    def __init__(self, kept_logits: Tensor, skip_logits: Tensor, groups: Sequence[DepthGroup]) -> None:
        """Normalise logits.

        Args:
            kept_logits: (B, L, C); ``IMPOSSIBLE`` where a choice is not offered.
            skip_logits: (B, L); ``IMPOSSIBLE`` where a block must be kept.
            groups: every block belongs to exactly one.
        """
        kept, skip = kept_logits.double(), skip_logits.double()
        total = torch.logsumexp(kept, dim=2)
        both = torch.logaddexp(total, skip)
        self.keep, self.skip = total - both, skip - both
        self.choice = kept - total[..., None]
        self.groups = tuple(groups)

    def choice_probabilities(self) -> Tensor:
        """(B, L, C) probabilities of a kept block's choices."""
        return self.choice.exp()

    def moments(self, costs: Tensor) -> Moments:
        """Mean and variance of R sums over kept blocks.

        Args:
            costs: (B, R, L, C) what a kept block with a choice adds.
        """
        probabilities, costs = self.choice_probabilities(), costs.double()
        first = torch.einsum("blc,brlc->blr", probabilities, costs)
        second = torch.einsum("blc,brlc->blr", probabilities, costs.square())
        batch, blocks, resources = first.shape
        mean = variance = first.new_zeros(batch, resources)
        log_norm = log_weight = first.new_zeros(batch)
        kept: list[Tensor] = [log_norm] * blocks
        for group in self.groups:
            part = self._group_moments(group, first, second)
            mean = mean + part[0]  # groups are independent of each other
            variance = variance + (part[1] - part[0].square()).clamp_min(0.0)
            log_norm, log_weight = log_norm + part[3], log_weight + part[4]
            for place, member in enumerate(group.members):
                kept[member] = part[2][:, place]
        return Moments(mean, variance, torch.stack(kept, dim=1), log_norm, log_weight)

    def _group_moments(self, group: DepthGroup, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Moments (B, R), the first and the second, keep probabilities (B, members), log-norm and log-weight (B,)."""
        batch, _, resources = first.shape
        size = len(group.members)
        log_count = first.new_full((batch, 1), 0.0)  # of keeping n of the blocks seen so far
        state = first.new_zeros(batch, 1, 2 * resources + size)  # means given n: sum, its square, blocks kept
        marks = torch.eye(size, dtype=first.dtype, device=first.device)
        never = first.new_full((batch, 1), IMPOSSIBLE)
        nothing = state[:, :1] * 0.0
        for place, member in enumerate(group.members):
            skipped = torch.cat([log_count + self.skip[:, member, None], never], dim=1)
            kept = torch.cat([never, log_count + self.keep[:, member, None]], dim=1)
            log_count = torch.logaddexp(skipped, kept)
            share = (kept - log_count).exp()[..., None]
            add = first[:, member, None]
            grown = torch.cat(
                [
                    state[..., :resources] + add,
                    state[..., resources : 2 * resources]
                    + 2.0 * add * state[..., :resources]
                    + second[:, member, None],
                    state[..., 2 * resources :] + marks[place],
                ],
                dim=2,
            )
            state = (1.0 - share) * torch.cat([state, nothing], dim=1) + share * torch.cat([nothing, grown], dim=1)
        allowed = group.weighed(log_count)
        log_norm = torch.logsumexp(allowed, dim=1)
        weight = (allowed - log_norm[:, None]).exp()
        result = (weight[..., None] * state[:, list(group.counts)]).sum(dim=1)
        log_weight = torch.zeros_like(log_norm)
        if group.log_weights is not None:
            log_weight = (weight * weight.new_tensor(group.log_weights)).sum(dim=1)
        parts = result[:, :resources], result[:, resources : 2 * resources], result[:, 2 * resources :]
        return *parts, log_norm, log_weight

    def divergence(self, moments: Moments, entropy: Tensor, offered: Tensor) -> Tensor:
        """Kullback-Leibler divergence (B,) from independent genes: kept or skipped evenly, choices evenly.

        The reference has no condition on the depth, which only adds a constant, but its weights.

        Args:
            moments: of this distribution.
            entropy: (B,) of this distribution.
            offered: (L,) number of choices that each block has.
        """
        even = self.keep.shape[1] * math.log(2.0)
        return even + (moments.kept * offered.double().log()).sum(dim=1) - moments.log_weight - entropy

    def entropy(self, moments: Moments) -> Tensor:
        """Entropy (B,) in nats."""
        probabilities = self.choice_probabilities()
        choices = -(probabilities * self.choice.clamp_min(-1e6)).sum(dim=2)
        kept = moments.kept
        mask = moments.log_norm - (kept * self.keep + (1.0 - kept) * self.skip.clamp_min(-1e6)).sum(dim=1)
        return mask - moments.log_weight + (kept * choices).sum(dim=1)

    def marginals(self, moments: Moments) -> Tensor:
        """(B, L, C + 1) probabilities of a block's choices, and of skipping it as the last one."""
        kept = moments.kept[..., None]
        return torch.cat([kept * self.choice_probabilities(), 1.0 - kept], dim=2)

    @torch.no_grad()
    def sample(self, generator: torch.Generator, count: int) -> Tensor:
        """Draw ``count`` subnets from the first distribution of the batch.

        Returns:
            (count, L) int64, the choice of each block, C where it is skipped.
        """
        choices = self.choice.shape[2]
        blocks = self.keep.shape[1]
        result = torch.empty(count, blocks, dtype=torch.int64)
        uniform = torch.rand(count, blocks, 2, generator=generator, dtype=torch.float64)
        start = torch.rand(count, len(self.groups), generator=generator, dtype=torch.float64)
        cumulative = self.choice[0].exp().cumsum(dim=1)
        cumulative = cumulative / cumulative[:, -1:]
        for number, group in enumerate(self.groups):
            counts = self._counts(group)
            allowed = torch.tensor(group.counts)
            final = group.weighed(counts[-1])
            places = (final - final.logsumexp(0)).exp().cumsum(0)
            drawn = torch.searchsorted(places / places[-1], start[:, number].contiguous())
            kept_so_far = allowed[drawn.clamp_max(len(allowed) - 1)]
            for place in range(len(group.members) - 1, -1, -1):
                member = group.members[place]
                before = torch.cat([counts[place], counts[place].new_full((1,), IMPOSSIBLE)])
                shifted = torch.cat([before.new_full((1,), IMPOSSIBLE), before[:-1]])
                chance = torch.sigmoid(shifted + self.keep[0, member] - before - self.skip[0, member])
                keep = uniform[:, member, 0] < chance[kept_so_far]
                picked = torch.searchsorted(cumulative[member], uniform[:, member, 1].contiguous(), right=True)
                result[:, member] = torch.where(keep, picked.clamp_max(choices - 1), choices)
                kept_so_far = kept_so_far - keep.long()
        return result

    def _counts(self, group: DepthGroup) -> list[Tensor]:
        """Log-probabilities of keeping n of the first k members, for k = 0 .. size; first of the batch."""
        counts = [self.keep.new_zeros(1)]
        for member in group.members:
            last = counts[-1]
            never = last.new_full((1,), IMPOSSIBLE)
            counts.append(
                torch.logaddexp(
                    torch.cat([last + self.skip[0, member], never]), torch.cat([never, last + self.keep[0, member]])
                )
            )
        return counts
