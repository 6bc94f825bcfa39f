from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dcqfa_ros import cli
from training.search.distance import DistanceError
from training.search.ray_executor import LOSSES, RayExecutor, Worker, connect
from training.search.teacher_distance import TeacherDistance
from training.subnet import Subnet

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--population", 8, "--generations", 2, "--samples", 16, "--top", 0, "--json")


class RayError(Exception):
    actor_init_failed = False


class RayActorError(RayError):
    pass


class RayTaskError(RayError):
    pass


@dataclass(eq=False)
class Reference:
    run: Callable[[], Any]
    method: str


class FakeRay:
    """The part of Ray that is used, in this process; results come in the reverse of the order they were asked for."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError)
        self.cpus = 2.0
        self.connected: tuple[str, dict[str, Any]] | None = None
        self.shipped: list[Any] = []
        self.actors = self.killed = self.answers = 0
        self.fails: Callable[[int, str], Exception | None] = lambda number, method: None
        self.refuses: Exception | None = None

    def init(self, address: str, **options: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.connected = (address, options)

    def shutdown(self) -> None:
        self.connected = None

    def cluster_resources(self) -> dict[str, float]:
        assert self.connected is not None
        return {"CPU": self.cpus}

    def put(self, value: Any) -> Any:
        self.shipped.append(value)
        return value

    def remote(self, num_cpus: int) -> Callable[[type], Any]:
        def make(cls: type) -> Any:
            def start(*arguments: Any) -> Any:
                self.actors += 1
                worker = cls(*arguments)
                return SimpleNamespace(**{name: self._method(worker, name) for name in ("distance", "introduce")})

            return SimpleNamespace(remote=start)

        return make

    def _method(self, worker: Any, name: str) -> Any:
        return SimpleNamespace(remote=lambda subnet: Reference(lambda: getattr(worker, name)(subnet), name))

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return refs[-1:], refs[:-1]

    def get(self, ref: Any) -> Any:
        error = self.fails(self.answers, ref.method)
        self.answers += 1
        if error is not None:
            raise error
        return ref.run()

    def kill(self, actor: Any) -> None:
        self.killed += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A stand-in for the module ``ray``."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    return fake


def test_figures_are_those_of_this_machine_and_networks_travel_once(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet]
) -> None:
    expected = list(teacher_distance(four_subnets))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        with RayExecutor(address).measuring(teacher_distance) as (measure, workers):
            assert ray.connected is not None and ray.connected[0] == address and workers == 2
            assert list(measure(four_subnets)) == expected and list(measure(four_subnets[:1])) == expected[:1]
            assert list(measure([])) == []
    assert ray.connected is None and len(ray.shipped) == 1 and ray.actors == 2


def test_what_a_lost_worker_was_measuring_is_measured_by_another(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet], capsys: pytest.CaptureFixture[str]
) -> None:
    lost: list[int] = []

    def fails(number: int, method: str) -> Exception | None:
        if number in (0, 3, 5):  # one before it did anything
            lost.append(number)
            return RayActorError("gone")
        return None

    ray.fails = fails
    with RayExecutor("auto", 3).measuring(teacher_distance) as (measure, workers):
        assert workers == 3 and list(measure(four_subnets)) == list(teacher_distance(four_subnets))
    assert lost == [0, 3, 5] and ray.killed == 3 and ray.actors == 6
    assert capsys.readouterr().err.count("a worker was lost; another one takes its place") == 3


def test_what_was_measured_before_a_network_is_given_up_is_kept(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet], monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(worker: Worker, subnet: Subnet) -> float:
        if subnet == four_subnets[2]:
            raise RayActorError("gone")
        return worker._distance.distance(subnet)

    monkeypatch.setattr(Worker, "distance", distance)
    found: list[float] = []
    with (
        pytest.raises(DistanceError, match=rf"--ray auto: {LOSSES + 1} workers in a row were lost .* is kept"),
        RayExecutor("auto", 1).measuring(teacher_distance) as (measure, _),
    ):
        found.extend(measure(four_subnets))
    assert found == list(teacher_distance(four_subnets[:2])) and ray.connected is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RayTaskError("Traceback\nModuleNotFoundError: No module named 'training'"), "a worker failed .*'training'"),
        (ConnectionError("gone"), "the connection was lost .*what was measured is kept"),
    ],
)
def test_a_cluster_that_cannot_do_it_is_told_of(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet], error: Exception, message: str
) -> None:
    ray.fails = lambda number, method: error
    with (
        pytest.raises(DistanceError, match=f"--ray auto: {message}"),
        RayExecutor("auto").measuring(teacher_distance) as (measure, _),
    ):
        list(measure(four_subnets))
    assert ray.connected is None


def test_a_worker_that_cannot_start_is_told_of(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet]
) -> None:
    error = RayActorError("Traceback\nModuleNotFoundError: No module named 'training'")
    error.actor_init_failed = True
    ray.fails = lambda number, method: error
    with (
        pytest.raises(DistanceError, match=r"cannot start \(ModuleNotFoundError.*requirements/train.txt"),
        RayExecutor("auto").measuring(teacher_distance) as (measure, _),
    ):
        list(measure(four_subnets))


def test_workers_that_are_lost_at_once_do_not_go_on_for_ever(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet]
) -> None:
    ray.fails = lambda number, method: RayActorError("gone")
    with (
        pytest.raises(DistanceError, match=f"{LOSSES + 1} workers in a row"),
        RayExecutor("auto").measuring(teacher_distance) as (measure, _),
    ):
        list(measure(four_subnets))
    assert ray.actors <= LOSSES + 3


def test_a_worker_with_other_figures_is_refused(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "distance", lambda worker, subnet: 1.02 * worker._distance.distance(subnet))
    with (
        pytest.raises(DistanceError, match=r"a worker \(.*torch .*\) measures .* where this machine measures"),
        RayExecutor("auto").measuring(teacher_distance) as (measure, _),
    ):
        list(measure(four_subnets))


def test_no_worker_at_all_is_told_of(
    ray: FakeRay, teacher_distance: TeacherDistance, four_subnets: list[Subnet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.search.ray_executor.START_SECONDS", 0.0)
    ray.wait = lambda refs, num_returns, timeout: ([], refs)  # type: ignore[method-assign]
    with (
        pytest.raises(DistanceError, match="no worker answered within 0 s; `ray status`"),
        RayExecutor("auto").measuring(teacher_distance) as (measure, _),
    ):
        list(measure(four_subnets))
    ray.cpus = 0.0
    with (
        pytest.raises(DistanceError, match="the cluster has no CPU"),
        RayExecutor("auto").measuring(teacher_distance),
    ):
        pass


def test_connecting_does_not_change_what_a_signal_does(ray: FakeRay) -> None:
    before, init = signal.getsignal(signal.SIGTERM), ray.init

    def taking(address: str, **options: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray puts a handler of its own there, and may fail then
        init(address, **options)

    def mine(number: int, frame: object) -> None:
        """What a run has there."""

    ray.init = taking  # type: ignore[method-assign]
    for refuses in (None, ConnectionError("no")):
        ray.refuses = refuses
        signal.signal(signal.SIGTERM, mine)
        try:
            with suppress(DistanceError):
                connect(ray, "auto", None, 0)
            assert signal.getsignal(signal.SIGTERM) is mine
        finally:
            signal.signal(signal.SIGTERM, before)


def test_a_cluster_that_is_not_there_is_named(ray: FakeRay, teacher_distance: TeacherDistance) -> None:
    ray.refuses = ConnectionError("Could not find any running Ray instance.\nmore")
    with (
        pytest.raises(
            DistanceError, match=r"--ray auto: no cluster can be reached there \(Could not find any .*\); start"
        ),
        RayExecutor("auto").measuring(teacher_distance),
    ):
        pass


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_answers_is_named_at_once(
    ray: FakeRay, teacher_distance: TeacherDistance, form: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(server.getsockname()[1])
    with (
        pytest.raises(DistanceError, match=f"--ray {address}: no cluster can be reached there .*refused"),
        RayExecutor(address).measuring(teacher_distance),
    ):
        pass
    assert ray.connected is None


@pytest.mark.parametrize("address", ["", "cluster", "http://cluster:1", "ray://cluster", "cluster:port"])
def test_what_is_no_address_is_refused(ray: FakeRay, address: str) -> None:
    with pytest.raises(DistanceError, match=r"expected auto, local, host:port or ray://host:port"):
        RayExecutor(address)


def test_a_search_on_ray_ends_as_one_on_this_machine(
    ray: FakeRay, in_process: Callable[[str], Run], supernet_run: Path, tmp_path: Path
) -> None:
    search = in_process("search")
    arguments = (supernet_run, "--device", "orin", *SMALL)
    code, here, errors = search(*arguments, "--workers", 1, "--out", tmp_path / "here")
    assert code == 0, errors
    code, there, errors = search(*arguments, "--ray", "local", "--out", tmp_path / "there")
    assert code == 0, errors
    one, other = json.loads(here), json.loads(there)
    assert (other["executor"], other["workers"]) == ("ray", 2) and one["executor"] == "local"
    differ = ("executor", "workers", "seconds", "result")
    assert {k: v for k, v in one.items() if k not in differ} == {k: v for k, v in other.items() if k not in differ}
    assert ray.connected is None


def test_ray_that_is_not_installed_is_named_before_anything_is_read(
    in_process: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for command, options in (("search", ("--device", "orin")), ("mixed", ())):
        code, output, errors = in_process(command)("nowhere", *options, "--ray", "local")
        assert code == cli.EXIT_USER_ERROR and output == ""
        assert "the Python package ray is not installed; pip install -r requirements/ray.txt" in errors


@pytest.fixture
def real_ray() -> Iterator[None]:
    """An installed Ray; whatever it started has ended behind the test."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("not exercised: ray is not installed (pip install -r requirements/ray.txt)")
    yield
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "ray::Worker" not in listing


@pytest.mark.slow
def test_a_local_instance_measures_the_same_figures_and_survives_a_lost_worker(
    real_ray: None, teacher_distance: TeacherDistance, four_subnets: list[Subnet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts Ray; tens of seconds."""
    import ray

    subnets = four_subnets * 8
    hired: list[Any] = []
    with RayExecutor("local", 2).measuring(teacher_distance) as (measure, workers):
        crew = measure.__self__  # type: ignore[attr-defined]
        found = []
        for place, value in enumerate(measure(subnets)):
            found.append(value)
            if place == 5:
                hired = [task.actor for task in crew._running.values()] + crew._idle
                ray.kill(hired[0])
    assert workers == 2 and len(hired) == 2
    assert found == list(teacher_distance(subnets))
