"""Figures typed from the paper: data with their source, shown beside ours, never used to choose or tune anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from dcqfa_ros.bundle.document import DocumentError, parse_document
from dcqfa_ros.bundle.schema import Name, Text
from dcqfa_ros.bundle.strict import StrictModel
from training.compare.config import BitsName, CompareError


class PaperTask(StrictModel):
    """A task of the paper.

    Attributes:
        label: what it is, as the table says it.
        metric: what its figures are.
        source: where they stand.
        caveat: why our row is not the same experiment; None where it is.
    """

    label: Text
    metric: Text
    source: Text
    caveat: Text | None = None


class PaperFigure(StrictModel):
    """One figure: of a task, a method (as entries name theirs) and bits."""

    task: Name
    method: Text
    bits: BitsName
    value: float


class PaperFigures(StrictModel):
    """The whole file."""

    tasks: dict[Name, PaperTask]
    figures: Annotated[tuple[PaperFigure, ...], Field(min_length=1)]

    def value(self, task: str | None, method: str, bits: str) -> float | None:
        """The paper's figure; its FP16 stands beside our full precision, whichever of FP32 and FP16 that is."""
        wanted = "fp16" if bits == "fp32" else bits
        rows = (f.value for f in self.figures if (f.task, f.method, f.bits) == (task, method, wanted))
        return next(rows, None)

    @model_validator(mode="after")
    def _once_each(self) -> PaperFigures:
        keys = [(figure.task, figure.method, figure.bits) for figure in self.figures]
        for key in keys:
            if key[0] not in self.tasks:
                raise ValueError(f"figure of task {key[0]}: tasks has no such one")
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the figure of {', '.join(twice)} is there twice")
        return self


def load_paper(path: Path) -> PaperFigures:
    """Read the figures.

    Raises:
        CompareError: the file is missing or not of the schema.
    """
    try:
        return parse_document(path.read_bytes(), PaperFigures)
    except OSError as error:
        raise CompareError(
            f"{path}: cannot be read ({error.strerror}); give the file of the paper's figures"
        ) from error
    except DocumentError as error:
        lines = [f"{path}: {field or '(document)'}: {message}" for field, message in error.issues]
        raise CompareError("\n".join(lines)) from error
