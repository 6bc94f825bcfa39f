from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcqfa_ros import atomic
from dcqfa_ros.atomic import replace_file, replacing


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return [path.name for path in folder.iterdir()]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(old=st.none() | st.binary(), new=st.binary())
def test_a_file_holds_the_old_bytes_until_the_block_has_ended_and_the_new_ones_then(
    tmp_path: Path, old: bytes | None, new: bytes
) -> None:
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    if old is not None:
        path.write_bytes(old)
    with replacing(path) as file:
        file.write(new)
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == old
        assert len(list(tmp_path.glob(".file.????????"))) == 1
    assert path.read_bytes() == new
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_full_disk_is_an_error_that_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def full(new: Path, _: int) -> int:
        new.touch()
        return os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(atomic, "_new", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_missing_folder_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "missing" / "file", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "umask", "left"), [(0o666, 0o022, 0o644), (0o666, 0o077, 0o600), (0o666, 0o002, 0o664), (0o600, 0, 0o600)]
)
def test_permissions_are_those_asked_for_less_the_umask_whatever_was_there(
    tmp_path: Path, mode: int, umask: int, left: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o777)
    before = os.umask(umask)
    try:
        replace_file(path, b"new", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == left
