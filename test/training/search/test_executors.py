from __future__ import annotations

import multiprocessing.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from training.checkpoint import load_checkpoint, save_checkpoint
from training.search.distance import DistanceError, SubnetDistance
from training.search.executors import LocalExecutor
from training.search.teacher_distance import DistanceSource, TeacherDistance
from training.subnet import Subnet
from training.supernet_checkpoint import load_supernet


def test_what_is_sent_to_other_processes_measures_the_same_figures(
    teacher_distance: TeacherDistance, four_subnets: list[Subnet]
) -> None:
    parcel = teacher_distance.parcel()
    for array in parcel.state.values():
        array.flags.writeable = False  # as from an object store
    unpacked = parcel.unpacked()
    assert list(unpacked(four_subnets)) == list(teacher_distance(four_subnets))
    assert min(unpacked(four_subnets)) > 0.0 and len(set(unpacked(four_subnets))) == 4


def test_distances_do_not_depend_on_the_number_of_processes(
    teacher_distance: TeacherDistance, four_subnets: list[Subnet]
) -> None:
    alone = list(teacher_distance(four_subnets))
    with LocalExecutor(1).measuring(teacher_distance) as (measure, workers):
        assert workers == 1 and list(measure(four_subnets)) == alone
    with LocalExecutor(2).measuring(teacher_distance) as (measure, workers):
        assert workers == 2 and list(measure(four_subnets)) == alone


def test_a_checkpoint_that_changes_while_it_is_searched_changes_nothing(
    supernet_run: Path, tmp_path: Path, one_thread: None
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes((supernet_run / "checkpoint.pt").read_bytes())
    supernet = load_supernet(folder)
    distance = TeacherDistance(DistanceSource(supernet.path, supernet.meaning.config, 8), supernet)
    subnets = [supernet.space.parse("w4a4")]
    alone = list(distance(subnets))
    payload = load_checkpoint(folder / "checkpoint.pt")
    payload["ema"]["head.weight"] += 1.0
    save_checkpoint(folder / "checkpoint.pt", payload)
    assert list(distance.parcel().unpacked()(subnets)) == alone  # weights are read once, whoever measures


class DeadlyDistance(SubnetDistance):
    """One whose processes are killed."""

    def __init__(self) -> None:
        pass

    def distance(self, subnet: Subnet) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    def parcel(self) -> DeadlyParcel:  # type: ignore[override]
        return DeadlyParcel()


class DeadlyParcel:
    def unpacked(self) -> DeadlyDistance:
        return DeadlyDistance()


@pytest.mark.timeout(60)
def test_processes_that_are_killed_while_they_start_are_told_of(
    four_subnets: list[Subnet], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = multiprocessing.util.spawnv_passfds

    def spawn(path: bytes, arguments: list[Any], descriptors: list[int]) -> int:
        found = original(path, arguments, descriptors)
        if "--multiprocessing-fork" in arguments:  # not the resource tracker
            os.kill(found, signal.SIGKILL)
        return found

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn)
    monkeypatch.setattr(DeadlyDistance, "parcel", lambda distance: bytes(2**20))  # more than a pipe holds
    with (
        pytest.raises(DistanceError, match="ended early"),
        LocalExecutor(2).measuring(DeadlyDistance()) as (measure, _),
    ):
        list(measure(four_subnets))


@pytest.mark.parametrize("error", [OSError(9, "Bad file descriptor"), ValueError("bad value(s) in fds_to_keep")])
def test_descriptors_that_are_closed_under_a_start_are_told_as_the_end_of_a_process(
    four_subnets: list[Subnet], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = multiprocessing.util.spawnv_passfds

    def spawn(path: bytes, arguments: list[Any], descriptors: list[int]) -> int:
        if "--multiprocessing-fork" in arguments:
            raise error
        return original(path, arguments, descriptors)

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn)
    with (
        pytest.raises(DistanceError, match="ended early") as told,
        LocalExecutor(2).measuring(DeadlyDistance()) as (measure, _),
    ):
        list(measure(four_subnets))
    assert told.value.__cause__ is error


def test_processes_that_are_killed_are_told_of(four_subnets: list[Subnet]) -> None:
    with (
        pytest.raises(DistanceError, match=r"ended early .*what was measured is kept.*fewer --workers"),
        LocalExecutor(2).measuring(DeadlyDistance()) as (measure, _),
    ):
        list(measure(four_subnets))
