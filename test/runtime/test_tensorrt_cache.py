"""A cached engine is used only if it is whole, unaltered and what was asked for; otherwise it is built again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.tensorrt_cache import CachedEngine, EngineCache, EngineKey, default_folder

KEY = EngineKey("ab" * 32, "tensorrt", "10.3.0", "8.7", 8, "cuda 12.6, module 540.4.0", ("strongly_typed", "no_tf32"))
PLAN = bytes(range(256)) * 40


class Builder:
    """Counts how often it is asked."""

    def __init__(self, plan: bytes = PLAN) -> None:
        self.plan, self.count = plan, 0

    def __call__(self) -> bytes:
        self.count += 1
        return self.plan


def files(folder: Path, key: EngineKey = KEY) -> tuple[Path, Path]:
    return folder / f"{key.digest()}.engine", folder / f"{key.digest()}.json"


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_an_engine_is_built_once_and_then_read(cache: EngineCache) -> None:
    build = Builder()
    assert cache.get(KEY, build) == CachedEngine(PLAN, built=True)
    assert cache.get(KEY, build) == CachedEngine(PLAN, built=False)
    assert EngineCache(cache.folder).get(KEY, build).plan == PLAN
    assert build.count == 1
    engine, sidecar = files(cache.folder)
    document = json.loads(sidecar.read_text())
    assert document["engine"] == {"sha256": hashlib.sha256(PLAN).hexdigest(), "bytes": len(PLAN)}
    assert document["key"]["driver"] == KEY.driver
    assert not list(cache.folder.glob("*.part"))
    assert cache.folder.stat().st_mode & 0o077 == 0
    assert engine.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"onnx_sha256": "cd" * 32},
        {"runtime": "tensorrt_rtx"},
        {"version": "10.16.0"},
        {"capability": "8.6"},
        {"multiprocessors": 16},
        {"driver": "cuda 13.0"},
        {"flags": ("strongly_typed",)},
    ],
)
def test_every_part_of_the_key_counts(cache: EngineCache, change: dict[str, Any]) -> None:
    cache.get(KEY, Builder())
    other = Builder(b"other")
    assert cache.get(replace(KEY, **change), other) == CachedEngine(b"other", built=True)
    assert cache.get(KEY, other).plan == PLAN


def truncated(engine: Path, sidecar: Path) -> None:
    engine.write_bytes(PLAN[:-1])


def emptied(engine: Path, sidecar: Path) -> None:
    engine.write_bytes(b"")


def changed_byte(engine: Path, sidecar: Path) -> None:
    engine.write_bytes(PLAN[:999] + b"\x00" + PLAN[1000:])


def no_engine(engine: Path, sidecar: Path) -> None:
    engine.unlink()


def no_sidecar(engine: Path, sidecar: Path) -> None:
    sidecar.unlink()


def garbage_sidecar(engine: Path, sidecar: Path) -> None:
    sidecar.write_bytes(b"\xff{not json")


def edit(path: str, value: Any) -> Callable[[Path, Path], None]:
    def change(engine: Path, sidecar: Path) -> None:
        document = json.loads(sidecar.read_text())
        *parents, last = path.split(".")
        place = document
        for parent in parents:
            place = place[parent]
        place[last] = value
        sidecar.write_text(json.dumps(document))

    return change


def sidecar_is_a_folder(engine: Path, sidecar: Path) -> None:
    sidecar.unlink()
    sidecar.mkdir()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncated, "it has 10239 bytes, its sidecar says 10240"),
        (emptied, "it has 0 bytes"),
        (changed_byte, "its SHA-256 is not the one in its sidecar"),
        (no_engine, r"\.engine is missing"),
        (no_sidecar, r"\.json is missing"),
        (garbage_sidecar, "cannot be read"),
        (edit("schema", 99), "not of this format"),
        (edit("key.version", "10.2.0"), "version in the sidecar is '10.2.0', expected '10.3.0'"),
        (edit("key.driver", "cuda 11.4"), "driver in the sidecar is 'cuda 11.4'"),
        (edit("key.onnx_sha256", "00" * 32), "onnx_sha256 in the sidecar"),
        (edit("key", None), "holds no key"),
        (edit("key.more", 1), "an unknown field"),
        (edit("engine.sha256", "00" * 32), "its SHA-256 is not the one"),
        (edit("engine.bytes", 1), "its sidecar says 1"),
        (edit("engine", []), "holds no SHA-256"),
    ],
)
def test_a_damaged_or_altered_entry_is_named_and_built_again(
    cache: EngineCache, damage: Callable[[Path, Path], None], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.get(KEY, Builder(PLAN))
    damage(*files(cache.folder))
    again = Builder(PLAN[::-1])
    found = cache.get(KEY, again)
    assert (found.plan, found.built, again.count) == (PLAN[::-1], True, 1)
    (note,) = found.notes
    assert re.search(text, note) and "built again" in note
    assert note in caplog.text
    assert cache.get(KEY, again) == CachedEngine(PLAN[::-1], built=False)


def test_a_rejected_entry_is_not_read_again(cache: EngineCache) -> None:
    cache.get(KEY, Builder())
    found = cache.get(KEY, Builder(b"new"), rejected="it cannot be deserialized")
    assert found.plan == b"new"
    assert "it cannot be deserialized; built again" in found.notes[0]
    assert cache.get(KEY, Builder()).plan == b"new"


def test_a_build_that_fails_leaves_nothing_and_frees_the_lock(cache: EngineCache) -> None:
    def fail() -> bytes:
        raise EngineError("no kernel")

    with pytest.raises(EngineError, match="no kernel"):
        cache.get(KEY, fail)
    assert not list(cache.folder.glob("*.engine"))
    assert cache.get(KEY, Builder()).built


CHILD = """
import os, signal, sys, time
from pathlib import Path
from dcqfa_ros.runtime import tensorrt_cache
from dcqfa_ros.runtime.tensorrt_cache import EngineCache, EngineKey
folder, mode = Path(sys.argv[1]), sys.argv[2]
key = EngineKey({key})
plan = bytes(range(256)) * 40

def build():
    with open(folder.parent / "builds", "a") as file:
        file.write("x")
    if mode == "slow":
        time.sleep(1.0)
    if mode == "killed_in_build":
        (folder.parent / "ready").touch()
        time.sleep(60)
    return plan

real = tensorrt_cache._replace
def dying(path, data):
    if mode == "killed_before_sidecar" and path.suffix == ".json":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "killed_in_write":
        part = path.with_name("." + path.name + ".1.x.part")
        part.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, data)
tensorrt_cache._replace = dying
found = EngineCache(folder, timeout=30).get(key, build)
assert found.plan == plan
"""


def child(folder: Path, mode: str) -> subprocess.Popen[bytes]:
    fields = ", ".join(repr(getattr(KEY, name)) for name in KEY.__dataclass_fields__)
    return subprocess.Popen([sys.executable, "-c", CHILD.replace("{key}", fields), str(folder), mode])


def test_two_processes_build_an_engine_once(cache: EngineCache) -> None:
    running = [child(cache.folder, "slow") for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert (cache.folder.parent / "builds").read_text() == "x"


@pytest.mark.parametrize("mode", ["killed_before_sidecar", "killed_in_write"])
def test_a_process_killed_while_it_writes_leaves_nothing_that_is_trusted(cache: EngineCache, mode: str) -> None:
    assert child(cache.folder, mode).wait(60) == -signal.SIGKILL
    build = Builder(b"sound")
    assert cache.get(KEY, build).plan == b"sound"
    assert build.count == 1


def test_a_process_killed_while_it_builds_frees_the_lock(cache: EngineCache) -> None:
    process = child(cache.folder, "killed_in_build")
    deadline = time.monotonic() + 60
    while not (cache.folder.parent / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting = EngineCache(cache.folder, timeout=0.2)
    with pytest.raises(EngineError, match=r"\.lock: another process has been building this engine for 0\.2 s"):
        waiting.get(KEY, Builder())
    process.kill()
    process.wait(60)
    assert waiting.get(KEY, Builder()).built


def age(folder: Path, key: EngineKey, seconds: float) -> None:
    then = time.time() - seconds
    for path in files(folder, key):
        os.utime(path, (then, then))


def test_the_least_recently_used_entries_are_pruned_by_size(cache: EngineCache) -> None:
    keys = [replace(KEY, version=f"10.{i}") for i in range(4)]
    for i, key in enumerate(keys):
        cache.get(key, Builder(bytes(1000)))
        age(cache.folder, key, 1000 * (10 - i))
    cache.get(keys[0], Builder())  # used now: the oldest is the second
    assert cache.prune(limit=2500) == [keys[1].digest(), keys[2].digest()]
    assert cache.get(keys[0], Builder()).plan == bytes(1000)
    assert cache.get(keys[3], Builder()).plan == bytes(1000)


def test_a_new_engine_makes_room_for_itself_and_stays(cache: EngineCache) -> None:
    small = EngineCache(cache.folder, limit=1500)
    first, second = KEY, replace(KEY, version="10.4")
    small.get(first, Builder(bytes(1000)))
    small.get(second, Builder(bytes(2000)))
    assert [path.stem for path in small.folder.glob("*.engine")] == [second.digest()]
    assert [path.stem for path in small.folder.glob("*.json")] == [second.digest()]


def test_leftovers_of_killed_processes_are_pruned(cache: EngineCache) -> None:
    cache.get(KEY, Builder())
    part, orphan = cache.folder / ".x.engine.1.2.part", cache.folder / "orphan.engine"
    fresh = cache.folder / ".y.engine.1.2.part"
    for path in (part, orphan, fresh):
        path.write_bytes(b"half")
    for path in (part, orphan):
        os.utime(path, (0, 0))
    assert cache.prune() == ["orphan"]
    assert not part.exists() and fresh.exists()
    assert not cache.get(KEY, Builder()).built


def test_a_folder_that_cannot_be_written_is_said_and_the_engine_is_built_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    found = EngineCache(tmp_path / "engines").get(KEY, Builder())
    assert found.plan == PLAN
    assert "cannot be written" in found.notes[0] and "every start builds the engine again" in found.notes[0]


def test_a_full_disk_is_said_and_the_engine_is_used_all_the_same(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dcqfa_ros.runtime.tensorrt_cache._replace", full)
    found = cache.get(KEY, Builder())
    assert found.plan == PLAN
    assert "cannot be kept (No space left on device)" in found.notes[0]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused(cache: EngineCache, mode: int) -> None:
    cache.folder.mkdir()
    cache.folder.chmod(mode)
    with pytest.raises(EngineError, match="others may write here, and engines are code; run chmod go-w"):
        cache.get(KEY, Builder())
    cache.folder.chmod(0o755)
    assert cache.get(KEY, Builder()).built


def test_a_folder_of_another_user_is_refused(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder.mkdir()
    owner = cache.folder.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    with pytest.raises(EngineError, match=f"it belongs to user {owner}.*expected a folder of user {owner + 1}"):
        cache.get(KEY, Builder())


def test_the_default_folder_follows_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dcqfa_ros" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == Path.home() / ".cache" / "dcqfa_ros" / "engines"
