"""TensorBoard log of a training run."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog:
    """Writes each record of a run as scalars: ``train/<name>``, or the name itself where it has a group (``a/b``)."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """Append to the events in ``folder``; what an earlier run logged after ``first_step`` is hidden."""
        self._folder, self._first_step = folder, first_step
        self._writer: SummaryWriter | None = None  # made by the first record: a run that is refused leaves no file

    def __call__(self, record: dict[str, float]) -> None:
        """Write one record; ``step`` is its position."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=self._first_step or None)
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, int(record["step"]))

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
