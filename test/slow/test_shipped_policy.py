"""The shipped policy itself: its score without ROS, and the same score through the graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcqfa_ros.ros.isolation import child_environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FIRST_SEED = 200_000  # not the published seeds: those are for reported figures only


def dcqfa(*arguments: str, cwd: Path = ROOT) -> dict[str, Any]:
    command = [sys.executable, "-m", "dcqfa_ros.cli", *arguments, "--json"]
    done = subprocess.run(
        command, cwd=cwd, env=child_environment(os.environ), capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def evaluate(variant: str, seeds: int) -> dict[str, Any]:
    return dcqfa(
        "eval", "models/pusht_keypoints", "--variant", variant, "--seeds", str(seeds), "--first-seed", str(FIRST_SEED)
    )


def test_ten_seeds_score_the_same_through_the_graph_and_without_ros(tmp_path: Path) -> None:
    summary = dcqfa(
        "demo", "--bundle", str(ROOT / "models/pusht_keypoints"), "--variant", "w8a8", "--seed", str(FIRST_SEED),
        "--realtime", "0", "--lockstep", "10", cwd=tmp_path,
    )  # fmt: skip
    without = evaluate("w8a8", 10)
    assert [t["seed"] for t in summary["trials"]] == without["seeds"]
    assert abs(summary["mean_score"] - without["mean"]) <= 0.02


@pytest.mark.parametrize("variant", ["fp32", "w8a8"])
def test_the_shipped_variants_push_the_block_home(variant: str) -> None:
    assert evaluate(variant, 30)["mean"] >= 0.75
