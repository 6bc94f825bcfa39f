from __future__ import annotations

import pytest
import torch

from training.draws import stratified_subnet
from training.predictor import rank_correlation
from training.search.predicted import DistancePredictor
from training.space import SearchSpace


def test_unseen_networks_are_ranked_by_their_distance(space: SearchSpace, made_up) -> None:
    generator = torch.Generator().manual_seed(0)
    subnets = [stratified_subnet(space, generator, whole_network=False) for _ in range(500)]
    distances = [made_up.distance(subnet) for subnet in subnets]
    model = DistancePredictor(space, subnets[:400], distances[:400])
    predicted = model.predict(subnets[400:])
    assert min(predicted) > 0.0
    correlation = rank_correlation(predicted, distances[400:])
    assert correlation is not None and correlation > 0.95


def test_nothing_to_fit_is_refused(space: SearchSpace) -> None:
    with pytest.raises(ValueError, match="at least one measured network"):
        DistancePredictor(space, [], [])
