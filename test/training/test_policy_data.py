from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from training.config import TrainConfig, override
from training.data.policy_data import Batch, PolicyData

Config = Callable[..., TrainConfig]


def same(one: Batch, other: Batch) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in Batch.__slots__)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def test_a_draw_follows_from_its_seed_alone(tiny_config: Config) -> None:
    data = PolicyData(tiny_config())
    first = data.draw(data.windows, 5, 16)
    torch.manual_seed(1)
    data.draw(data.windows, 6, 3)
    assert same(data.draw(data.windows, 5, 16), first)
    assert same(PolicyData(tiny_config()).draw(data.windows, 5, 16), first)
    assert not same(data.draw(data.windows, 6, 16), first)


def test_a_draw_holds_the_windows_that_it_numbers(tiny_config: Config) -> None:
    data = PolicyData(tiny_config())
    batch = data.draw(data.windows, 0, 200)
    assert batch.observation.shape == (200, 2, 20) and batch.action.shape == batch.noise.shape == (200, 16, 2)
    assert torch.equal(batch.observation, data.windows.observation[batch.index])
    assert torch.equal(batch.action, data.windows.action[batch.index])
    for numbers, end in ((batch.index, len(data.windows)), (batch.timesteps, 100)):
        assert bool(((numbers >= 0) & (numbers < end)).all())
    assert len(batch.timesteps.unique()) > 50


def test_the_beginning_of_a_batch_is_a_view(tiny_config: Config) -> None:
    data = PolicyData(override(tiny_config(), policy={"prefix": 8}))
    batch = data.draw(data.windows, 0, 8)
    first = batch.first(3)
    for name in Batch.__slots__:
        whole, part = getattr(batch, name), getattr(first, name)
        assert part.data_ptr() == whole.data_ptr() and torch.equal(part, whole[:3])
    moved = batch.to(torch.device("cpu"))
    assert same(moved, batch)


def test_facts_are_plain_and_tell_data_apart(
    tiny_config: Config, tmp_path: Path, npz: Path, arrays: dict[str, np.ndarray]
) -> None:
    facts = PolicyData(tiny_config()).facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["train_episodes"] == 3
    assert PolicyData(tiny_config()).facts() == facts
    other = PolicyData(override(tiny_config(), data={"split_seed": 1})).facts()
    assert other["data_sha256"] == facts["data_sha256"] and other["action_norm"] != facts["action_norm"]
    arrays["action"][3] += 1.0
    np.savez(npz, **arrays)
    assert PolicyData(tiny_config()).facts()["data_sha256"] != facts["data_sha256"]
