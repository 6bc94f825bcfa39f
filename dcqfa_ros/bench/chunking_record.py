"""What is kept of a finished set of episodes, and the file from which an interrupted benchmark goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from dcqfa_ros.atomic import replace_file
from dcqfa_ros.bench.chunking_metrics import EpisodeTrack, mean_and_p95, mean_jerk
from dcqfa_ros.bench.processes import BenchError
from dcqfa_ros.bundle.strict import StrictModel
from dcqfa_ros.runtime.chunking import Method

_Count = Annotated[int, Field(ge=0)]
_Score = Annotated[float, Field(ge=0.0, le=1.0)]
_Size = Annotated[float, Field(ge=0.0)]


class Outcome(StrictModel):
    """One method at one latency: a figure per seed, in the order of the seeds, and what is pooled over all episodes.

    Attributes:
        method: how one chunk followed another.
        ticks: control periods from an observation to the effect of its chunk.
        bundle: name of the bundle.
        variant: of the bundle.
        weights: identity of what it computes.
        timing_note: what of delay and execution horizon had to be changed to fit the chunk, empty where nothing.
        scores: 0..1 per seed.
        steps: control ticks per seed.
        starved: ticks without an action per seed.
        chunks: inferences per seed.
        late: chunks of all episodes that came when all their actions had been consumed.
        jerk: of the commanded targets, units/s^3 per seed; None for an episode of fewer than four ticks.
        agent_jerk: of the arm's motion likewise.
        discontinuity: mean distance between old and new chunk at a change; None where no change could be compared.
        discontinuity_p95: 95th percentile of the same.
        seams: changes of chunk that were compared.
        jump: mean distance between the first action of a new chunk and the one executed before it.
        seconds: computing time.
    """

    method: Method
    ticks: _Count
    bundle: str
    variant: str
    weights: str
    timing_note: str
    scores: tuple[_Score, ...] = Field(min_length=1)
    steps: tuple[_Count, ...]
    starved: tuple[_Count, ...]
    chunks: tuple[_Count, ...]
    late: _Count
    jerk: tuple[_Size | None, ...]
    agent_jerk: tuple[_Size | None, ...]
    discontinuity: _Size | None
    discontinuity_p95: _Size | None
    seams: _Count
    jump: _Size | None
    seconds: _Size

    @model_validator(mode="after")
    def _one_per_seed(self) -> Outcome:
        for name in ("steps", "starved", "chunks", "jerk", "agent_jerk"):
            if len(getattr(self, name)) != len(self.scores):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, scores has {len(self.scores)}")
        return self


def summarize_tracks(
    tracks: Sequence[EpisodeTrack],
    rate_hz: float,
    *,
    method: Method,
    ticks: int,
    bundle: str,
    variant: str,
    weights: str,
    timing_note: str,
    seconds: float,
) -> Outcome:
    """Reduce episodes, in the order of their seeds, to their figures; the keywords are fields of the outcome."""
    seams = [seam for track in tracks for seam in track.seams]
    mean, p95 = mean_and_p95(seams)
    return Outcome(
        method=method,
        ticks=ticks,
        bundle=bundle,
        variant=variant,
        weights=weights,
        timing_note=timing_note,
        scores=tuple(track.score for track in tracks),
        steps=tuple(track.steps for track in tracks),
        starved=tuple(track.starved for track in tracks),
        chunks=tuple(track.chunks for track in tracks),
        late=sum(track.late for track in tracks),
        jerk=tuple(mean_jerk(track.targets, rate_hz) for track in tracks),
        agent_jerk=tuple(mean_jerk(track.positions, rate_hz) for track in tracks),
        discontinuity=mean,
        discontinuity_p95=p95,
        seams=len(seams),
        jump=mean_and_p95([jump for track in tracks for jump in track.jumps])[0],
        seconds=round(seconds, 2),
    )


class Settings(StrictModel):
    """What all rows of a table have in common; rows obtained otherwise are not mixed with them.

    Attributes:
        bundle: name of the bundle.
        variant: that was asked for.
        first_seed: first start seed.
        seeds: number of start seeds.
        denoising_steps: per chunk; None for each bundle's own.
        execution_horizon: actions between two inferences.
        threads: inference threads.
        versions: of Python and packages.
    """

    bundle: str
    variant: str
    first_seed: _Count
    seeds: Annotated[int, Field(ge=1)]
    denoising_steps: Annotated[int, Field(ge=1)] | None
    execution_horizon: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)]
    versions: dict[str, str]


class _File(StrictModel):
    format: Literal[1]
    settings: Settings
    outcomes: tuple[Outcome, ...]


class Record:
    """Finished outcomes, kept in a file where one is given. Each is written as a whole as soon as it is there."""

    def __init__(self, settings: Settings, path: Path | None = None) -> None:
        """Go on from ``path`` where it exists, begin it where it does not.

        Raises:
            BenchError: the file cannot be read or written, is none of this benchmark's, or was made with other settings
                (named); it is then as it was.
        """
        self.settings, self._path = settings, path
        self.outcomes: list[Outcome] = []
        if path is None:
            return
        if path.exists():
            self.outcomes = list(_read(path, settings))
        else:
            self._write()  # before the first episode: a folder that cannot be written to shows now

    def find(self, method: Method, ticks: int, weights: str) -> Outcome | None:
        """Return the outcome of a method at a latency on these weights, if it is there."""
        keys = ((o, (o.method, o.ticks, o.weights)) for o in self.outcomes)
        return next((outcome for outcome, key in keys if key == (method, ticks, weights)), None)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome.

        Raises:
            BenchError: the file cannot be written.
        """
        self.outcomes.append(outcome)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        content = _File(format=1, settings=self.settings, outcomes=tuple(self.outcomes))
        try:
            replace_file(self._path, content.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise BenchError(f"--resume {self._path}: cannot be written ({error.strerror})") from error


def _read(path: Path, settings: Settings) -> tuple[Outcome, ...]:
    try:
        file = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BenchError(f"--resume {path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise BenchError(
            f"--resume {path}: {field}: {first['msg']}; expected a file that this benchmark wrote; give another name"
        ) from error
    for name in Settings.model_fields:
        theirs, ours = getattr(file.settings, name), getattr(settings, name)
        if theirs != ours:
            raise BenchError(
                f"--resume {path}: was made with {name} = {theirs}, now it is {ours}; use the same, or another file"
            )
    wrong = next((o for o in file.outcomes if len(o.scores) != settings.seeds), None)
    if wrong is not None:
        raise BenchError(
            f"--resume {path}: {wrong.method.value} at {wrong.ticks} ticks has {len(wrong.scores)} scores, "
            f"expected {settings.seeds}; give another name"
        )
    return file.outcomes
