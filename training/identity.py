"""Which configurations describe the same run, and which fields may be others when it is continued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from training.config import OptimizerConfig, TrainConfig

CHANGEABLE = MappingProxyType(
    {
        "run.steps": "--change-length",
        "supernet.sandwich": "--change-sandwich",
        "supernet.sampler.stratified_share": "--change-sandwich",
        **{f"optimizer.{field}": "--change-optimizer" for field in OptimizerConfig.model_fields},
        "supernet.step_learning_rate": "--change-optimizer",
        "supernet.tables": "--change-tables",
    }
)
"""Fields that may be others when a run is continued, if that is asked for, and the options that ask for it."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that continues it: all but paths, texts and bookkeeping."""
    document = config.model_dump(
        mode="json", exclude={"name": True, "license": True, "task": True, "data": {"path", "format"}}
    )
    if document["data"]["image"] is not None:
        del document["data"]["image"]["file"]
    observations = document["data"]["observations"]
    for source in observations.values():
        del source["names"]
    document["data"]["observations"] = list(observations.items())  # their order matters too
    document["run"] = {key: document["run"][key] for key in ("steps", "batch", "seed", "precision")}
    document["warm_start"] = document["warm_start"] is not None  # what it holds is compared instead
    if document["supernet"] is not None:
        for path in ("warm_start", "tables"):  # what they hold is compared instead
            del document["supernet"][path]
        share = "stratified_share"  # of the draws: apart from what the sampler is made of
        document["supernet"][f"sampler.{share}"] = document["supernet"]["sampler"].pop(share)
    if document["distill"] is not None:
        for field in ("start", "workers", "ray"):  # what start holds is compared; where groups run changes nothing
            del document["distill"][field]
    flat: dict[str, Any] = {}
    for section, value in document.items():
        fields = {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        flat.update(fields)
    return flat


def changes(names: Iterable[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Differences of two identities in some fields, as text; those of a section part by part."""
    found = []
    for name in names:
        if not isinstance(before[name], dict):
            found.append(f"{name} {before[name]} -> {now[name]}")
            continue
        parts = ((key, value, now[name][key]) for key, value in before[name].items())
        found += [f"{name}.{key} {old} -> {new}" for key, old, new in parts if old != new]
    return tuple(found)
