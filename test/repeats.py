"""Tests that meet the wall clock get a second try, and a crash of a test process costs one test.

Tests of the folders in ``WALL_CLOCK`` drive processes, threads, sockets and pseudo-terminals in real time. A shared
host stalls now and then for longer than a deadline that would still show a fault, so such a test is repeated at once
when it fails (pytest-rerunfailures). First failures are printed in full at the end and counted in the closing line, and
``--max-suite-reruns`` in pyproject.toml bounds how many a run may have: beyond it they fail. What only computes, and
every property test, has one try.
"""

from __future__ import annotations

from typing import Any

import pytest

WALL_CLOCK = ("bench", "commands", "drivers", "faults", "nodes", "ros", "runtime", "trials", "watchdog")


def mark(items: list[pytest.Item]) -> None:
    """Mark what may be repeated; under ``--pdb`` nothing is."""
    for item in items:
        if item.config.option.usepdb:
            return
        folders = item.nodeid.split("::")[0].split("/")[:-1]
        of_properties = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        if folders[:1] == ["test"] and set(folders[1:2]) & set(WALL_CLOCK) and not of_properties:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole files, also after a test process has died.

    The scheduler of ``--dist loadfile`` (pytest-xdist 3.8.0) hands the test that killed a process to the next one, and
    waits for ever for files of which nothing is left to be run.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]  # pytest-xdist may be missing
        def add_node_collection(self, node: Any, collection: Any) -> None:
            super().add_node_collection(node, collection)
            if node not in self.registered_collections:
                node.shutdown()  # it found other tests than the others, as where a file was edited meanwhile

        def remove_node(self, node: Any) -> str | None:
            left: dict[str, dict[str, bool]] = {}
            for scope, tests in self.assigned_work.pop(node).items():
                if waiting := {name: done for name, done in tests.items() if not done}:
                    left[scope] = waiting
            if not left:
                return None
            scope = next(iter(left))
            crashed = next(iter(left[scope]))
            del left[scope][crashed]
            self._give_back({scope: tests for scope, tests in left.items() if tests})
            return crashed

        def mark_test_pending(self, item: str) -> None:
            self._give_back({self._split_scope(item): {item: False}})

        def _give_back(self, work: dict[str, dict[str, bool]]) -> None:
            for scope, tests in work.items():
                self.workqueue[scope] = {**tests, **self.workqueue.get(scope, {})}
            for node in self.assigned_work:
                self._reschedule(node)

        def _assign_work_unit(self, node: Any) -> None:
            scope = next(iter(self.workqueue))
            before = self.assigned_work.get(node, {}).get(scope, {})
            super()._assign_work_unit(node)
            self.assigned_work[node][scope] = {**before, **self.assigned_work[node][scope]}

        def _reschedule(self, node: Any) -> None:
            if node not in self.registered_collections or node.shutting_down:
                return  # one that still collects is served by schedule()
            # A process holds its last test back until it has another one, or knows that none follows.
            while self.workqueue and self._pending_of(self.assigned_work[node]) <= 2:
                self._assign_work_unit(node)
            if not self.workqueue:
                node.shutdown()

    return Files(config, log)
