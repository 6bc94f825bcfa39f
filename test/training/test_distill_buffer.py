from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.config import TrainConfig
from training.distill_buffer import StateBuffer
from training.objective import Objective
from training.rollouts_group import Visited


def visited(first: int, count: int, known: bool = True) -> Visited:
    values = np.arange(first, first + count, dtype=np.float32)
    return Visited(
        observation=np.broadcast_to(values[:, None, None], (count, 2, 3)).copy(),
        path=np.broadcast_to(values[:, None, None, None], (count, 4, 5, 2)).copy(),
        teacher=np.full((count, 5, 2), 0.25, np.float32),
        known=np.full(count, known),
        teacher_calls=count,
        restarts=0,
    )


@pytest.fixture
def objective(tiny_config: Callable[..., TrainConfig]) -> Objective:
    """One whose noised actions tell action and level: 100 levels, the signal is the level's number, no noise."""
    found = Objective(tiny_config(), torch.device("cpu"))
    found.signal, found.sigma = torch.arange(100.0), torch.zeros(100)
    return found


STEPS = np.array([90, 60, 30, 0])


def test_the_oldest_states_leave_first() -> None:
    buffer = StateBuffer(10, STEPS)
    for first in (0, 6, 12):
        buffer.add(visited(first, 6))
    assert buffer.count == 10
    assert sorted(buffer.state_dict()["arrays"]["observation"][:, 0, 0].tolist()) == list(range(8, 18))
    with pytest.raises(ValueError, match="at once"):
        buffer.add(visited(0, 11))


def test_half_of_any_first_rows_are_of_the_own_path_the_others_of_the_teacher(objective: Objective) -> None:
    buffer = StateBuffer(10, STEPS)
    buffer.add(visited(100, 10))
    batch = buffer.draw(40, 0.5, objective, 100, torch.Generator().manual_seed(0))
    own = batch.action[:, 0, 0] >= 50.0  # paths hold the state's number, the teacher's actions are at most 25
    for count in (2, 7, 20, 40):
        assert int(own[:count].sum()) == count // 2
    assert torch.equal(batch.action[own][:, 0, 0], batch.observation[own][:, 0, 0])
    assert set(batch.timesteps[own].tolist()) <= set(STEPS.tolist())
    assert len(set(batch.timesteps[~own].tolist())) > 4
    expected = (0.25 * batch.timesteps[~own])[:, None, None]  # the teacher's action is 0.25
    assert torch.equal(batch.action[~own], expected.expand(-1, 5, 2))


def test_the_teachers_actions_get_the_noise_of_their_level(objective: Objective) -> None:
    objective.signal, objective.sigma = torch.zeros(100), torch.arange(100.0)
    buffer = StateBuffer(10, STEPS)
    buffer.add(visited(100, 10))
    batch = buffer.draw(400, 0.0, objective, 100, torch.Generator().manual_seed(0))
    noise = batch.action / batch.timesteps.clamp_min(1)[:, None, None]
    assert float(noise[batch.timesteps > 0].std()) == pytest.approx(1.0, abs=0.05)
    assert not batch.action[batch.timesteps == 0].any()


def test_shares_of_none_and_all_and_a_buffer_that_cannot_serve(objective: Objective) -> None:
    generator, buffer = torch.Generator().manual_seed(0), StateBuffer(10, STEPS)
    with pytest.raises(ValueError, match="empty"):
        buffer.draw(2, 1.0, objective, 100, generator)
    buffer.add(visited(100, 4, known=False))
    assert (buffer.draw(6, 1.0, objective, 100, generator).action >= 100).all()
    with pytest.raises(ValueError, match="teacher's actions"):
        buffer.draw(6, 0.5, objective, 100, generator)
    buffer.add(visited(200, 1))
    batch = buffer.draw(6, 0.0, objective, 100, generator)
    assert (batch.observation == 200).all() and (batch.action < 50).all()


def test_a_stored_buffer_of_other_steps_or_capacity_is_refused() -> None:
    buffer = StateBuffer(10, STEPS)
    buffer.add(visited(0, 8))
    state = buffer.state_dict()
    for other in (StateBuffer(7, STEPS), StateBuffer(10, STEPS[:2])):
        with pytest.raises(ValueError, match="another capacity"):
            other.load_state_dict(state)
    same = StateBuffer(10, STEPS)
    same.load_state_dict(state)
    same.add(visited(8, 4))
    buffer.add(visited(8, 4))
    ours, theirs = buffer.state_dict()["arrays"], same.state_dict()["arrays"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_visited_states_join_in_order() -> None:
    joined = Visited.join([visited(0, 2), replace(visited(2, 1), restarts=3)])
    assert len(joined) == 3 and joined.observation[:, 0, 0].tolist() == [0, 1, 2]
    assert (joined.teacher_calls, joined.restarts) == (3, 3)
