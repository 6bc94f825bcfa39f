"""The network that a search has chosen, read from its ``front.json`` (docs/search.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, ValidationError

from dcqfa_ros.bundle.strict import StrictModel
from training.export.variant import ExportError
from training.supernet_checkpoint import load_supernet
from training.warm_start import state_sha256


class _Subnet(StrictModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    chosen: bool


class _Front(StrictModel):
    model_config = ConfigDict(extra="ignore")  # what only people read is not looked at

    schema_version: Literal[1]
    run: str
    network_sha256: str
    device: str
    fingerprint: str
    modelled: bool
    steps: int
    latency_budget_ms: float | None
    memory_budget_bytes: float | None
    subnets: tuple[_Subnet, ...]


def chosen_of(file: Path, checkpoint: Path) -> tuple[str, str]:
    """Name of the subnet that a search has chosen for the supernet ``checkpoint``, and what the search was for.

    Args:
        file: the search's ``front.json``.
        checkpoint: run folder or checkpoint of the supernet.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ExportError: the file cannot be read, is of other weights, or has not chosen exactly one network.
    """
    try:
        front = _Front.model_validate_json(file.read_bytes(), strict=True)
    except OSError as error:
        raise ExportError(f"--front {file}: cannot be read ({error.strerror}); give a search's front.json") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(document)"
        raise ExportError(f"--front {file}: {where}: {first['msg']}; give a front.json of this version") from error
    if front.network_sha256 != state_sha256(load_supernet(checkpoint).network.state_dict()):
        raise ExportError(
            f"--front {file}: the search was made with other weights ({front.run}) than those of {checkpoint}; "
            "search this supernet again"
        )
    chosen = [subnet.name for subnet in front.subnets if subnet.chosen]
    if len(chosen) != 1:
        raise ExportError(f"--front {file}: {len(chosen)} networks are chosen, expected 1; search again")
    limits = [f"at most {front.latency_budget_ms:g} ms"] if front.latency_budget_ms is not None else []
    if front.memory_budget_bytes is not None:
        limits.append(f"at most {front.memory_budget_bytes / 1e6:g} MB")
    kind = " (modelled)" if front.modelled else ""
    return chosen[0], ", ".join([f"{front.device}{kind}, {front.fingerprint}", *limits, f"{front.steps} steps"])
