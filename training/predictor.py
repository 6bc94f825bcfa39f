"""Prediction of what a subnet loses against the frozen teacher, fitted during the run on paired losses.

The model is linear in features that an additive view of the network suggests (what each layer gave up) and in a few
interactions (neighbouring blocks skipped, products of the totals given up). Linear, because then the fit is one small
solve that needs no step size, forgets old pairs by a factor as the weights move on, and has an expectation in closed
form under a distribution with independent layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcqfa_ros.errors import UserError
from training.space import SearchSpace
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

TOTALS = 5  # blocks skipped, heads, MLP channels, weight bits and activation bits given up
SCALE_PAIRS = 1024  # latest pairs that say what size of loss is usual
LEAST_JUDGED = 8  # fewer judged pairs say nothing


class AdvantageError(UserError, ValueError):
    """A paired loss that cannot be used; the message names the subnet."""


class ChoiceIndex:
    """Numbers of a block's choices, in the order of cost tensors flattened over (H, M, W, A).

    Attributes:
        sizes: (H, M, W, A), the greatest number of choices over all blocks.
        count: H * M * W * A; this number itself stands for a skipped block.
        offered: (L, count) bool, which numbers a block really has.
    """

    def __init__(self, space: SearchSpace) -> None:
        """Number the choices of ``space``."""
        self.space = space
        self.sizes = (
            max(len(choices) for choices in space.head_choices),
            max(len(choices) for choices in space.mlp_choices),
            len(space.weight_bits),
            len(space.activation_bits),
        )
        h, m, w, a = self.sizes
        self.count = h * m * w * a
        offered = torch.zeros(len(space.shape.blocks), h, m, w, a, dtype=torch.bool)
        for block, (heads, mlp) in enumerate(zip(space.head_choices, space.mlp_choices, strict=True)):
            offered[block, : len(heads), : len(mlp)] = True
        self.offered = offered.flatten(1)

    def encode(self, subnet: Subnet) -> list[int]:
        """Numbers of a subnet's choices, one per block; a whole-network precision counts as the widest integers."""
        _, m, w, a = self.sizes
        space = self.space
        whole = subnet.precision is not Precision.INT
        numbers = []
        for block, layer in enumerate(subnet.layers):
            if layer is None:
                numbers.append(self.count)
                continue
            head = space.head_choices[block].index(layer.heads)
            mlp = space.mlp_choices[block].index(layer.mlp)
            bits = (w - 1, a - 1) if whole else (space.weight_bits.index(layer.w), space.activation_bits.index(layer.a))
            numbers.append(((head * m + mlp) * w + bits[0]) * a + bits[1])
        return numbers

    def decode(self, numbers: Sequence[int]) -> Subnet:
        """The subnet at integer precision with these choices."""
        _, m, w, a = self.sizes
        space = self.space
        layers: list[Layer | None] = []
        for block, number in enumerate(numbers):
            if number == self.count:
                layers.append(None)
                continue
            rest, bits_a = divmod(number, a)
            rest, bits_w = divmod(rest, w)
            head, mlp = divmod(rest, m)
            layers.append(
                Layer(
                    space.head_choices[block][head],
                    space.mlp_choices[block][mlp],
                    space.weight_bits[bits_w],
                    space.activation_bits[bits_a],
                )
            )
        return Subnet(tuple(layers), Precision.INT)


def _even_skips(space: SearchSpace) -> Tensor:
    """(L,) float32 probability that a block is skipped where genes are even, or depths are where they have a list."""
    share = torch.full((len(space.shape.blocks),), 0.5)
    for group, blocks in space.groups.items():
        if group not in space.elastic_groups:
            share[list(blocks)] = 0.0
        elif group in space.config.depths:
            free = [block for block in blocks if block not in space.always_kept]
            kept = [count - (len(blocks) - len(free)) for count in space.depth_choices[group]]
            share[list(blocks)] = 0.0
            share[free] = 1.0 - sum(kept) / len(kept) / max(1, len(free))
    return share


class AdvantagePredictor:
    """Ridge regression of L(subnet) - L(teacher) with exponential forgetting.

    Pairs whose loss is far above the usual count less, in proportion to its square: errors are relative there, and the
    loss of a network of two blocks would otherwise drown what four bits cost.

    Attributes:
        coefficients: (F,) float64.
        observed: number of pairs seen.
    """

    def __init__(
        self, space: SearchSpace, window: int = 8192, ridge: float = 0.1, log: int = 65_536, recent: int = 512
    ) -> None:
        """Start without any pair: every subnet is predicted to lose nothing.

        Args:
            space: the search space.
            window: pairs after which an observation's weight has fallen to 1/e.
            ridge: strength of the prior, in pairs of usual size.
            log: latest pairs kept for later fits.
            recent: latest pairs whose predictions, made before they were fitted, are kept to be judged.
        """
        self.space, self.index = space, ChoiceIndex(space)
        self.window, self.ridge, self.capacity, self.recent = window, ridge, log, recent
        self.blocks = len(space.shape.blocks)
        self.whole = tuple(FLOAT_BITS)
        ends = {members[-1] for members in space.groups.values()}
        self._neighbours = torch.tensor([i for i in range(self.blocks - 1) if i not in ends], dtype=torch.int64)
        self.layer_features, self.given_up = _layer_tables(space, self.index)
        self.features = (
            self.blocks * self.layer_features.shape[2]
            + len(self._neighbours)
            + TOTALS * (TOTALS + 1) // 2
            + len(self.whole)
            + 1
        )
        self._rows, self._columns = torch.triu_indices(TOTALS, TOTALS)
        self._skip_share = _even_skips(space)
        size = self.features
        self._gram = torch.zeros(size, size, dtype=torch.float64)
        self._target = torch.zeros(size, dtype=torch.float64)
        self.coefficients = torch.zeros(size, dtype=torch.float64)
        self._numbers = torch.empty(0, self.blocks, dtype=torch.int16)
        self._precisions = torch.empty(0, dtype=torch.int8)
        self._losses = torch.empty(0, dtype=torch.float64)
        self._judged = torch.empty(0, 2, dtype=torch.float64)  # prediction, outcome
        self.observed = 0
        generator = torch.Generator().manual_seed(0)
        skipped = torch.rand(512, self.blocks, generator=generator) < self._skip_share
        chosen = torch.multinomial(self.index.offered.float(), 512, replacement=True, generator=generator).T
        reference = torch.where(skipped, self.index.count, chosen)
        self._reference = self._encode(reference, torch.full((512,), -1))

    def __len__(self) -> int:
        """Number of pairs in the log."""
        return len(self._losses)

    def observe(self, subnets: Sequence[Subnet], advantages: Sequence[float]) -> None:
        """Take pairs into the log and the sums of the fit; :meth:`fit` makes them count.

        Args:
            subnets: what was trained.
            advantages: L(subnet) - L(frozen full-precision teacher) on the same batch, noise and time steps.

        Raises:
            AdvantageError: a loss that is not finite, or not one per subnet.
        """
        if len(subnets) != len(advantages):
            raise AdvantageError(f"advantages: expected one per subnet ({len(subnets)}), got {len(advantages)}")
        if not subnets:
            return
        losses = torch.tensor([float(value) for value in advantages], dtype=torch.float64)
        for subnet, loss in zip(subnets, losses.tolist(), strict=True):
            if not torch.isfinite(torch.tensor(loss)):
                raise AdvantageError(
                    f"advantage of {self.space.name(subnet)}: expected a finite number, got {loss}; skip this batch"
                )
        numbers, precisions = self._numbers_of(subnets)
        features = self._encode(numbers, precisions)
        judged = torch.stack([features @ self.coefficients, losses], dim=1)
        self._judged = torch.cat([self._judged, judged])[-self.recent :]
        self._numbers = torch.cat([self._numbers, numbers.to(torch.int16)])[-self.capacity :]
        self._precisions = torch.cat([self._precisions, precisions.to(torch.int8)])[-self.capacity :]
        self._losses = torch.cat([self._losses, losses])[-self.capacity :]
        usual = float(self._losses[-SCALE_PAIRS:].abs().median().clamp_min(1e-12))
        weights = 1.0 / (1.0 + (losses / usual).square())
        keep = (1.0 - 1.0 / self.window) ** len(losses)
        self._gram = keep * self._gram + (features * weights[:, None]).T @ features
        self._target = keep * self._target + features.T @ (weights * losses)
        self.observed += len(losses)

    def fit(self) -> None:
        """Solve for the coefficients."""
        if self.observed:
            prior = torch.full((self.features,), self.ridge, dtype=torch.float64)
            prior[-1] = 1e-6  # the mean is free
            self.coefficients = torch.cholesky_solve(
                self._target[:, None], torch.linalg.cholesky(self._gram + torch.diag(prior))
            )[:, 0]

    def predict(self, subnets: Sequence[Subnet]) -> Tensor:
        """Predicted L(subnet) - L(teacher), float64 (N,)."""
        return self._encode(*self._numbers_of(subnets)) @ self.coefficients

    def spread(self) -> float:
        """Standard deviation of the prediction over subnets of independent even genes; 0 before the first fit."""
        return float((self._reference @ self.coefficients).std())

    def expected(self, marginals: Tensor) -> Tensor:
        """Expected prediction (B,) at integer precision where layers are independent, differentiable.

        Args:
            marginals: (B, L, C + 1) float64 probabilities of each block's choices, the last one to skip it.
        """
        linear = torch.einsum("blc,lcf->blf", marginals, self.layer_features).flatten(1)
        skipped = marginals[..., -1]
        adjacent = skipped[:, self._neighbours + 1] * skipped[:, self._neighbours]
        mean = torch.einsum("blc,lct->blt", marginals, self.given_up)
        products = self.given_up[..., self._rows] * self.given_up[..., self._columns]
        own = torch.einsum("blc,lcq->bq", marginals, products)
        own = own - (mean[..., self._rows] * mean[..., self._columns]).sum(dim=1)
        total = mean.sum(dim=1)
        quadratic = total[:, self._rows] * total[:, self._columns] + own
        used = torch.cat([linear, adjacent, quadratic], dim=1)
        return used @ self.coefficients[: used.shape[1]] + self.coefficients[-1]

    def preference(self) -> Tensor:
        """Slope (L, C + 1) of the expected prediction in the marginals, at independent even genes."""
        even = torch.cat([self.index.offered.double(), torch.zeros(self.blocks, 1, dtype=torch.float64)], dim=1)
        skipped = self._skip_share.double()
        even = (1.0 - skipped[:, None]) * even / even.sum(dim=1, keepdim=True)
        even[:, -1] = skipped
        even.requires_grad_(True)
        (slope,) = torch.autograd.grad(self.expected(even[None]).sum(), even)
        return slope

    def correlation(self) -> float:
        """Spearman's correlation of the recent pairs with predictions made before they were fitted, or 0."""
        if len(self._judged) < LEAST_JUDGED:
            return 0.0
        return rank_correlation(*self._judged.T.tolist()) or 0.0

    def pairs(self) -> tuple[list[Subnet], list[float]]:
        """The logged subnets and their losses against the teacher, oldest first."""
        subnets = []
        for numbers, precision in zip(self._numbers.tolist(), self._precisions.tolist(), strict=True):
            subnet = self.index.decode(numbers)
            if precision >= 0:
                subnet = _at_precision(subnet, self.whole[precision])
            subnets.append(subnet)
        return subnets, self._losses.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned, as tensors and numbers."""
        return {
            "gram": self._gram.clone(),
            "target": self._target.clone(),
            "coefficients": self.coefficients.clone(),
            "numbers": self._numbers.clone(),
            "precisions": self._precisions.clone(),
            "losses": self._losses.clone(),
            "judged": self._judged.clone(),
            "observed": self.observed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a predictor of the same space.

        Raises:
            AdvantageError: the state belongs to another space.
        """
        if tuple(state["gram"].shape) != tuple(self._gram.shape) or state["numbers"].shape[1] != self.blocks:
            raise AdvantageError(
                f"sampler state: {state['gram'].shape[0]} features over {state['numbers'].shape[1]} blocks, this space "
                f"has {self.features} over {self.blocks}; resume with the search space that it was saved with"
            )
        self._gram, self._target = state["gram"].clone(), state["target"].clone()
        self.coefficients = state["coefficients"].clone()
        self._numbers, self._precisions = state["numbers"].clone(), state["precisions"].clone()
        self._losses, self._judged = state["losses"].clone(), state["judged"].clone()
        self.observed = int(state["observed"])

    def _numbers_of(self, subnets: Sequence[Subnet]) -> tuple[Tensor, Tensor]:
        """Choice numbers (N, L) and precisions (N,), -1 for integers."""
        precisions = [-1 if s.precision is Precision.INT else self.whole.index(s.precision) for s in subnets]
        return torch.tensor([self.index.encode(subnet) for subnet in subnets]), torch.tensor(precisions)

    def _encode(self, numbers: Tensor, precisions: Tensor) -> Tensor:
        """Features (N, F) float64 of choice numbers (N, L) and precisions (N,)."""
        blocks = torch.arange(self.blocks)
        linear = self.layer_features[blocks, numbers].flatten(1)
        skipped = (numbers == self.index.count).double()
        adjacent = skipped[:, self._neighbours + 1] * skipped[:, self._neighbours]
        total = self.given_up[blocks, numbers].sum(dim=1)
        quadratic = total[:, self._rows] * total[:, self._columns]
        whole = (precisions[:, None] == torch.arange(len(self.whole))).double()
        return torch.cat([linear, adjacent, quadratic, whole, torch.ones(len(numbers), 1, dtype=torch.float64)], dim=1)


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's correlation; None for fewer than 3 pairs or where all of one side are equal."""
    if len(predicted) < 3:
        return None
    ranks = torch.stack([_ranks(predicted), _ranks(measured)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    norm = float(ranks.square().sum(dim=1).prod().sqrt())
    return float((ranks[0] * ranks[1]).sum()) / norm if norm > 0.0 else None


def _ranks(values: Sequence[float]) -> Tensor:
    """Ranks (N,) float64, ties at their mean."""
    tensor = torch.tensor(values, dtype=torch.float64)
    below = (tensor[None, :] < tensor[:, None]).sum(dim=1)
    equal = (tensor[None, :] == tensor[:, None]).sum(dim=1)
    return below.double() + 0.5 * (equal.double() - 1.0)


def _layer_tables(space: SearchSpace, index: ChoiceIndex) -> tuple[Tensor, Tensor]:
    """Features (L, C + 1, F) of every choice of every block, and the shares it gives up (L, C + 1, TOTALS).

    Features are indicators, all 0 for a full block at the widest bits: skipped, each lesser head count, MLP width and
    bit width, and both bit widths at once.
    """
    h, m, w, a = index.sizes
    blocks = len(space.shape.blocks)
    places = torch.cartesian_prod(torch.arange(h), torch.arange(m), torch.arange(w), torch.arange(a)).reshape(-1, 4)
    features, given_up = [], []
    for block in range(blocks):
        heads, mlp = space.head_choices[block], space.mlp_choices[block]
        top = (len(heads) - 1, len(mlp) - 1, w - 1, a - 1)
        lesser = [
            [value for value in range(size) if value != best] for size, best in zip(index.sizes, top, strict=True)
        ]
        columns = [(places[:, gene] == value).double() for gene in range(4) for value in lesser[gene]]
        columns += [((places[:, 2] == x) & (places[:, 3] == y)).double() for x in lesser[2] for y in lesser[3]]
        block_features = torch.stack([torch.zeros(index.count, dtype=torch.float64), *columns], dim=1)
        skipped = torch.zeros(1, block_features.shape[1], dtype=torch.float64)
        skipped[0, 0] = 1.0
        features.append(torch.cat([block_features, skipped]))
        shares = [
            _missing(heads, h)[places[:, 0]],
            _missing(mlp, m)[places[:, 1]],
            _missing(space.weight_bits, w)[places[:, 2]],
            _missing(space.activation_bits, a)[places[:, 3]],
        ]
        given = torch.stack([torch.zeros(index.count, dtype=torch.float64), *shares], dim=1)
        given_up.append(torch.cat([given, skipped[:, :1] * torch.eye(1, TOTALS, dtype=torch.float64)]))
    return torch.stack(features), torch.stack(given_up) / blocks


def _missing(choices: Sequence[int], size: int) -> Tensor:
    """Share of the greatest choice that each one lacks; choices that a block does not have repeat the last."""
    values = [*choices, *[choices[-1]] * (size - len(choices))]
    return 1.0 - torch.tensor(values, dtype=torch.float64) / max(choices)


def _at_precision(subnet: Subnet, precision: Precision) -> Subnet:
    bits = FLOAT_BITS[precision]
    layers = tuple(None if layer is None else Layer(layer.heads, layer.mlp, bits, bits) for layer in subnet.layers)
    return Subnet(layers, precision)
