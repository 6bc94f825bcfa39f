"""What a search leaves: the network that it chooses, a front that can be exported, and a table for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.files import write_atomically
from training.lut import LookUpTable

SCHEMA_VERSION = 1
MEGA = 1e6
RESULT, FRONT, PICTURE, PAGE = "result.json", "front.json", "front.png", "front.html"


def chosen(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The network that a search recommends: the best score in closed loop, or without one the nearest to the teacher.

    Returns:
        ``name``, ``latency_ms``, ``memory_bytes``, ``distance`` and ``closed_loop`` (mean score, None where no network
        played).
    """
    scores = {row["subnet"]: row["score"] for row in facts["ranked"]}
    rows = [row for row in facts["front"] if row["subnet"] in scores] or facts["front"]
    best = min(rows, key=lambda row: (-scores.get(row["subnet"], 0.0), row["distance"]))
    return {
        "name": best["subnet"],
        **{field: best[field] for field in ("latency_ms", "memory_bytes", "distance")},
        "closed_loop": scores.get(best["subnet"]),
    }


def front_document(facts: Mapping[str, Any], table: LookUpTable, network_sha256: str, steps: int) -> dict[str, Any]:
    """The front as ``dcqfa export --front`` reads it; ``docs/search.md`` describes the fields.

    Args:
        facts: of the search, with ``chosen``.
        table: of the device.
        network_sha256: of the supernet's averaged weights.
        steps: denoising steps of a chunk.
    """
    scores = {row["subnet"]: row["score"] for row in facts["ranked"]}
    memory = facts["memory_budget_mb"]
    return {
        "schema_version": SCHEMA_VERSION,
        "run": facts["run"],
        "step": facts["step"],
        "network_sha256": network_sha256,
        "device": facts["device"],
        "table": table.name,
        "table_sha256": facts["table_sha256"],
        "fingerprint": table.device.fingerprint,
        "runtime": table.runtime,
        "threads": table.threads,
        "modelled": table.modelled,
        "steps": steps,
        "latency_budget_ms": facts["latency_budget_ms"],
        "memory_budget_bytes": None if memory is None else memory * MEGA,
        "subnets": [
            {
                "name": row["subnet"],
                **{field: row[field] for field in ("latency_ms", "memory_bytes", "distance", "mean_bits")},
                "closed_loop": scores.get(row["subnet"]),
                "chosen": row["subnet"] == facts["chosen"]["name"],
            }
            for row in facts["front"]
        ],
    }


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON for people and programs.

    Raises:
        WriteError: the disk refuses; the previous file is untouched.
    """
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def print_result(facts: Mapping[str, Any]) -> None:
    """The front as a table, what was compared, and what to do next."""
    print(f"{facts['device']}, {'modelled' if facts['modelled'] else 'measured'} table {facts['table']}")
    width = max(len(row["subnet"]) for row in [*facts["front"], {"subnet": "subnet"}])
    print(f"{'subnet':<{width}} {'distance':>9} {'ms':>8} {'MB':>7} {'bits':>5}")
    for row in facts["front"]:
        print(
            f"{row['subnet']:<{width}} {row['distance']:9.5f} {row['latency_ms']:8.3f} "
            f"{row['memory_bytes'] / MEGA:7.2f} {row['mean_bits']:5.2f}"
        )
    volume = f"hypervolume {facts['hypervolume']:.3f}"
    if facts["random_hypervolume"] is not None:
        volume += f", random search {facts['random_hypervolume']:.3f} with {facts['random_measured']} networks"
    elif facts["predicted_from"] is not None:
        volume += " (no random search beside predicted distances; --full compares with it)"
    predicted = ""
    if facts["rank_correlation"] is not None:
        predicted = f"; rank correlation of predictions {facts['rank_correlation']:.2f}"
    print(f"{facts['measured']} networks, {facts['new_distances']} distances measured anew{predicted}")
    print(f"{volume}; {facts['seconds']} s; {facts['result']}")
    for row in facts["ranked"]:
        print(f"closed loop  {row['score']:.3f}  {row['subnet']}")
    best = facts["chosen"]
    print(
        f"chosen  {best['name']}: {best['latency_ms']:.3f} ms, {best['memory_bytes'] / MEGA:.2f} MB, distance "
        f"{best['distance']:.5f}"
    )
    front = Path(facts["result"]).with_name(FRONT)
    print(f"export it  dcqfa export {shlex.quote(facts['run'])} --out BUNDLE --front {shlex.quote(str(front))}")
