"""Prediction of a network's distance from those that were measured: what a search of another device starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from training.predictor import AdvantagePredictor
from training.space import SearchSpace
from training.subnet import Subnet

NO_FORGETTING = 10**9  # measured distances do not age, unlike losses that a run logs while it trains
LEAST = 1e-9


class DistancePredictor:
    """The configuration sampler's regression, on logarithms of distances: their errors are relative."""

    def __init__(self, space: SearchSpace, subnets: Sequence[Subnet], distances: Sequence[float]) -> None:
        """Fit to measured networks.

        Raises:
            ValueError: there is none.
        """
        if not subnets:
            raise ValueError("expected at least one measured network")
        self._predictor = AdvantagePredictor(space, window=NO_FORGETTING)
        logs = [math.log(max(distance, LEAST)) for distance in distances]
        self._offset = min(logs)
        self._predictor.observe(subnets, [value - self._offset for value in logs])
        self._predictor.fit()

    def predict(self, subnets: Sequence[Subnet]) -> list[float]:
        """Predicted distances."""
        if not subnets:
            return []
        logs: list[float] = (self._predictor.predict(subnets) + self._offset).tolist()
        return [math.exp(value) for value in logs]


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's correlation; None for fewer than 3 pairs or where all of one side are equal."""
    if len(predicted) < 3:
        return None
    ranks = torch.stack([_ranks(predicted), _ranks(measured)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    norm = float(ranks.square().sum(dim=1).prod().sqrt())
    return float((ranks[0] * ranks[1]).sum()) / norm if norm > 0.0 else None


def _ranks(values: Sequence[float]) -> torch.Tensor:
    """Ranks (N,) float64, ties at their mean."""
    tensor = torch.tensor(values, dtype=torch.float64)
    below = (tensor[None, :] < tensor[:, None]).sum(dim=1)
    equal = (tensor[None, :] == tensor[:, None]).sum(dim=1)
    return below.double() + 0.5 * (equal.double() - 1.0)
