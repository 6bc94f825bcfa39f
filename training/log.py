"""TensorBoard log of a training run."""

from __future__ import annotations

import itertools
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from training.messages import warn

_NUMBER = itertools.count()  # a process may begin several logs in one second


class TensorBoardLog:
    """Writes each record of a run as scalars: ``train/<name>``, or the name itself where it has a group (``a/b``).

    Records are written where they come from, not by a thread as ``SummaryWriter`` does: a disk that refuses ends the
    log with a warning, and never the training.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """Append to the events in ``folder``; what an earlier run logged after ``first_step`` is hidden."""
        self._folder, self._first_step = folder, first_step
        self._file: IO[bytes] | None = None  # made by the first record: a run that is refused leaves no file
        self._ended = False

    def __call__(self, record: dict[str, float]) -> None:
        """Write one record; ``step`` is its position."""
        if self._ended:
            return
        values = [
            Summary.Value(tag=name if "/" in name else f"train/{name}", simple_value=value)
            for name, value in record.items()
            if name != "step"
        ]
        try:
            if self._file is None:
                self._file = self._begin()
            self._write(Event(step=int(record["step"]), summary=Summary(value=values)))
            self._file.flush()
        except OSError as error:
            self._end(error)

    def close(self) -> None:
        """Close the event file."""
        self._ended = True
        if self._file is not None:
            with suppress(OSError):  # every record is flushed: nothing is lost that was not told
                self._file.close()

    def _begin(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        place = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBER)}"
        self._file = (self._folder / f"events.out.tfevents.{place}").open("wb")
        self._write(Event(file_version="brain.Event:2"))
        if self._first_step:
            self._write(Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START)))
        return self._file

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self._file).write(event.SerializeToString())

    def _end(self, error: OSError) -> None:
        self._ended = True
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
        warn(
            f"{self._folder}: TensorBoard events cannot be written ({error.strerror or error}); training goes on "
            "without them. Free disk space, then stop with Ctrl-C and run the same command again to have them back"
        )
