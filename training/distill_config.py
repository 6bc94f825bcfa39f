"""The ``distill`` section of a training configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dcqfa_ros.bundle.schema import Positive, Text
from dcqfa_ros.bundle.strict import StrictModel

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DistillConfig(StrictModel):
    """Multi-step distillation of a trained supernet on states that it visits itself (``algorithms.md`` section 6).

    ``states`` is the one switch between the method and its control: everything else, number of teacher calls included,
    is equal by construction.

    Attributes:
        start: run folder or checkpoint of the supernet that is trained on.
        states: ``rollouts`` visits states with the networks that are trained; ``demonstrations`` (the control,
            off-policy) takes as many from the demonstrations.
        weight: of the loss on these states: L = L_train + weight * L_OPD, where L_train is the supernet's own loss.
        warmup_steps: over which ``weight`` grows from 0.
        path_share: of the noisy actions taken from the network's own denoising path; the others are the teacher's
            actions with noise.
        worlds: environments of a round.
        groups: shares of the worlds, each driven by a network of its own and by one batched call per chunk.
        calls: policy calls of every world in a round.
        horizons: policy calls after which a world starts anew from a demonstration; they follow each other over the
            run in equal parts.
        collect_every: optimizer steps from one round to the next.
        buffer: states kept; the oldest leave first.
        denoising_steps: of a policy call in rollouts (DDIM).
        teacher_until: share of the run after which the teacher acts no more; before, its action is executed with
            probability 1 - progress / teacher_until.
        low: subnet that drives a group in ``low_share`` of the cases. The other groups are driven by the one of fewer
            mean bits out of ``candidates`` draws of the configuration sampler for a device.
        workers: processes that run groups; None for one per core. Does not change what is collected.
        ray: address of a Ray cluster whose actors run the groups instead; does not change it either.
    """

    start: Text
    states: Literal["rollouts", "demonstrations"] = "rollouts"
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    path_share: Share = 0.5
    worlds: Positive = 64
    groups: Positive = 2
    calls: Positive = 16
    horizons: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    collect_every: Positive = 80
    buffer: Positive = 20_000
    denoising_steps: Positive = 8
    teacher_until: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    low: Text = "w4a4"
    low_share: Share = 0.5
    candidates: Positive = 2
    workers: Positive | None = None
    ray: Text | None = None

    @model_validator(mode="after")
    def _sizes(self) -> DistillConfig:
        if self.worlds % self.groups:
            raise ValueError(f"worlds {self.worlds} do not divide into groups {self.groups}")
        if max(self.horizons) > self.calls:
            raise ValueError(f"horizons: {max(self.horizons)} exceeds the calls {self.calls} of a round")
        if self.worlds * self.calls > self.buffer:
            raise ValueError(
                f"buffer {self.buffer} does not hold one round of {self.worlds} worlds with {self.calls} calls"
            )
        return self

    def horizon(self, progress: float) -> int:
        """Policy calls between two starts at ``progress`` (0 to 1) of the run."""
        return self.horizons[min(int(progress * len(self.horizons)), len(self.horizons) - 1)]

    def teacher_acts(self, progress: float) -> float:
        """Probability that the teacher's action is executed at ``progress`` (0 to 1) of the run."""
        return max(0.0, 1.0 - progress / self.teacher_until)
