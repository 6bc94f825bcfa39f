"""Prediction of a network's distance from those that were measured: what a search of another device starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
