"""Collects what a running trial publishes into one record (no ROS: the trial node feeds it key-value pairs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcqfa_ros.runtime.swaps import ComputedBy
from dcqfa_ros.trials.records import TrialMode, TrialPart, TrialRecord, TrialSwap

NORMAL_STOPS = ("success", "step_limit")


@dataclass(frozen=True, slots=True)
class PlannedTrial:
    """One trial to run: its seed and whether time passes in real time or in lockstep."""

    mode: TrialMode
    seed: int

    @classmethod
    def parse(cls, text: str) -> PlannedTrial:
        """Read ``realtime:SEED`` or ``lockstep:SEED``.

        Raises:
            ValueError: another form; the message shows the expected one.
        """
        mode, separator, seed = text.partition(":")
        known = {m.value: m for m in TrialMode}
        if not separator or mode not in known or not seed.isdigit():
            raise ValueError(f"trial {text!r}: expected realtime:SEED or lockstep:SEED, such as lockstep:200000")
        return cls(known[mode], int(seed))

    def __str__(self) -> str:
        return f"{self.mode.value}:{self.seed}"


@dataclass
class TrialCollector:
    """State of the trial under way; ``episode`` is the arm's number of it."""

    planned: PlannedTrial
    episode: int
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    curve: list[float] = field(default_factory=list)
    states: list[NDArray[np.float64]] = field(default_factory=list)
    targets: list[NDArray[np.float64]] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    score: float = 0.0
    starved: int = 0
    missed: int = 0
    lost: int = 0
    stop_code: str = ""
    stop_reason: str = ""
    final_step: int | None = None
    chunks: int = 0
    inference_ms: tuple[float, float] | None = None
    policy_reported: bool = False
    parts: tuple[TrialPart, ...] = ()
    swaps: list[TrialSwap] = field(default_factory=list)

    def judgement(self, values: Mapping[str, str]) -> None:
        """Take one judgement of the cell; those of other episodes are ignored, lost ones counted."""
        if int(values["episode"]) != self.episode:
            return
        step = int(values["step"])
        gap = step - len(self.curve) - 1
        if gap < 0:
            return
        coverage = min(1.0, max(0.0, float(values["coverage"])))
        self.lost += gap
        self.curve += [coverage] * (gap + 1)
        self.score = float(values["score"])
        self.starved, self.missed = int(values["starved_ticks"]), int(values["missed_ticks"])
        self.states.append(np.array([float(v) for v in values["state"].split()]))
        self.targets.append(np.array([float(v) for v in values["target"].split()]))

    def arm_state(self, values: Mapping[str, str]) -> None:
        """Take the arm's state; a disarming ends the trial."""
        if int(values["episode"]) == self.episode and values["state"] == "disarmed":
            if not self.stop_code:  # the first reason counts
                self.stop_code, self.stop_reason = values["code"], values["reason"]
            self.final_step = int(values["step"])
            self.missed = int(values["missed_ticks"])

    def variant(self, name: str) -> None:
        """Note the variant that computes the chunks now."""
        if name and (not self.variants or self.variants[-1] != name):
            self.variants.append(name)

    def policy_report(self, values: Mapping[str, str]) -> None:
        """Take the policy's figures of the episode: chunks, inference latency, which engine computed what."""
        if int(values["episode"]) != self.episode:
            return
        self.policy_reported = True
        self.chunks = int(values["chunks"])
        if self.chunks:
            self.inference_ms = float(values["inference_p50_ms"]), float(values["inference_p99_ms"])
            parts = ComputedBy.parse(values.get("computed_by", "[]"))
            self.parts = tuple(TrialPart(first_chunk=n, engine=e) for n, e in parts if n < self.chunks)

    def swap(self, values: Mapping[str, str]) -> None:
        """Take the outcome of an exchange of variants (:meth:`dcqfa_ros.runtime.swaps.SwapResult.values`)."""
        told: dict[str, Any] = {name: values[name] for name in TrialSwap.model_fields if name not in ("step", "reason")}
        numbers = {"swap_id": int(told["swap_id"]), "load_ms": float(told["load_ms"]), "gap_ms": float(told["gap_ms"])}
        self.swaps.append(TrialSwap(**told | numbers, step=len(self.curve), reason=values["reason"][:2000]))

    @property
    def stopped(self) -> bool:
        """Whether the arm was disarmed."""
        return bool(self.stop_code)

    @property
    def complete(self) -> bool:
        """Whether everything that belongs to the trial has arrived."""
        return self.stopped and self.policy_reported and len(self.curve) >= (self.final_step or 0)

    def record(self, device: str, cell: str) -> TrialRecord:
        """The finished trial's record."""
        p50, p99 = self.inference_ms or (None, None)
        return TrialRecord(
            seed=self.planned.seed,
            score=min(1.0, max(0.0, self.score)),
            steps=len(self.curve),
            stop_reason=self.stop_code or "unknown",
            variant=", ".join(dict.fromkeys(self.variants)) or "none",
            device=device,
            curve=tuple(self.curve),
            missed_ticks=self.missed,
            starved_ticks=self.starved,
            chunks=self.chunks,
            inference_ms_p50=p50,
            inference_ms_p99=p99,
            started=self.started,
            mode=self.planned.mode,
            cell=cell,
            parts=self.parts,
            swaps=tuple(self.swaps),
        )
