"""The shared state record: consistent under load, honest about missing, dead, taken and stale cells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcqfa_ros.sim.cell_state import CellStateError, CellStateReader, CellStateWriter, cell_state_name

STATE = [1.0, 2.0, 3.0, 4.0, 5.0]

BUSY_WRITER = """
import sys
from pathlib import Path
from dcqfa_ros.sim.cell_state import CellStateWriter
writer = CellStateWriter("cell", Path(sys.argv[1]))
value = 0.0
writer.write([value] * 5, [value] * 2)
print("ready", flush=True)
while True:
    value += 1.0
    writer.write([value] * 5, [value] * 2)
"""


def start_writer(folder: Path) -> subprocess.Popen[str]:
    """Start a process that writes equal numbers as fast as it can."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY_WRITER, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_reader_in_another_process_never_sees_a_torn_state_and_notices_death(tmp_path: Path) -> None:
    process = start_writer(tmp_path)
    try:
        reader = CellStateReader("cell", directory=tmp_path)
        last = 0
        for _ in range(3000):
            seen = reader.read()
            assert seen.target is not None
            assert len({*seen.state.tolist(), *seen.target.tolist()}) == 1
            assert seen.sequence >= last
            last = seen.sequence
        assert last > 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    with pytest.raises(CellStateError, match="gone"):
        reader.read()
    assert (tmp_path / "cell").exists()  # a killed process could not remove it
    writer = CellStateWriter("cell", tmp_path)  # its successor takes the name over
    with pytest.raises(CellStateError, match="not shown a state yet"):
        reader.read()
    writer.write(STATE, None)
    assert reader.read().sequence == 1
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_written_state_is_read_back_exactly(tmp_path: Path) -> None:
    writer, reader = CellStateWriter("cell", tmp_path), CellStateReader("cell", directory=tmp_path)
    writer.write(STATE, None, stamp_ns=123)
    seen = reader.read()
    assert (seen.sequence, seen.stamp_ns, seen.state.tolist(), seen.target) == (1, 123, STATE, None)
    writer.write(STATE[::-1], (0.1, 0.2))
    seen = reader.read()
    assert seen.target is not None
    assert (seen.sequence, seen.state.tolist(), seen.target.tolist()) == (2, STATE[::-1], [0.1, 0.2])
    reader.close()
    writer.close()


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    first = CellStateWriter("cell", tmp_path)
    with pytest.raises(CellStateError, match="another simulated cell"):
        CellStateWriter("cell", tmp_path)
    first.close()
    first.close()
    CellStateWriter("cell", tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_survives_the_restart_of_its_cell(tmp_path: Path) -> None:
    reader = CellStateReader("cell", directory=tmp_path)
    for value in (1.0, 2.0):
        with pytest.raises(CellStateError):
            reader.read()
        writer = CellStateWriter("cell", tmp_path)
        writer.write([value] * 5, None)
        assert reader.read().state[0] == value
        writer.close()
    with pytest.raises(CellStateError, match="gone"):
        reader.read()


def test_an_old_state_is_refused_where_an_age_is_given(tmp_path: Path) -> None:
    writer = CellStateWriter("cell", tmp_path)
    writer.write(STATE, None, stamp_ns=time.monotonic_ns() - 10_000_000_000)
    assert CellStateReader("cell", directory=tmp_path).read().state.tolist() == STATE
    with pytest.raises(CellStateError, match=r"10\.\d\d s old"):
        CellStateReader("cell", maximum_age_s=1.0, directory=tmp_path).read()
    writer.close()


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    writer, reader = CellStateWriter("cell", tmp_path), CellStateReader("cell", directory=tmp_path)
    writer.write(STATE, None)
    with open(tmp_path / "cell", "r+b") as file:
        file.seek(16)  # behind the magic and the number of the current write: both slots
        file.write(b"\xff" * 100)
    with pytest.raises(CellStateError, match="damaged"):
        reader.read()
    writer.write(STATE, None)
    assert reader.read().sequence == 2
    writer.close()


def test_a_file_that_is_no_record_and_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(CellStateError, match="not a complete record"):
        CellStateReader("short", directory=tmp_path).read()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CellStateError, match="cannot create"):
        CellStateWriter("link", tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_bad_state_or_target_leaves_the_old_record(tmp_path: Path) -> None:
    writer, reader = CellStateWriter("cell", tmp_path), CellStateReader("cell", directory=tmp_path)
    writer.write(STATE, None)
    with pytest.raises(ValueError, match="state"):
        writer.write([np.nan] * 5, None)
    with pytest.raises(ValueError, match="target"):
        writer.write(STATE, [np.nan, 0.0])
    assert reader.read().sequence == 1
    writer.close()
    with pytest.raises(CellStateError, match="closed"):
        writer.write(STATE, None)


def test_names_keep_domains_and_namespaces_apart() -> None:
    names = [cell_state_name(d, n) for d in (0, 1) for n in ("", "/a", "/a/b", "/a_b")]
    assert len(set(names)) == len(names)
    assert cell_state_name(0, "a/b") == cell_state_name(0, "/a/b") == cell_state_name(0, "/a/b/")
    for domain, namespace in ((-1, ""), (233, ""), (0, "/a b"), (0, "/../x"), (0, "/a//b")):
        with pytest.raises(ValueError):
            cell_state_name(domain, namespace)


@given(st.text(max_size=20))
def test_no_name_leaves_the_folder(name: str) -> None:
    folder = Path("/nonexistent")
    try:
        CellStateReader(name, directory=folder).read()
    except ValueError:
        return
    except CellStateError:
        assert os.sep not in name
        assert not name.startswith(".")
