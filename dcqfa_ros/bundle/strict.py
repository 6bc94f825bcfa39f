"""The one base class of every configuration model: typed, immutable, unknown fields refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A typed, frozen model read from YAML that refuses unknown fields, ill-typed values, NaN and infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
