"""``dcqfa pack``: a supernet's checkpoint small enough to ship."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def pack(subparsers: Any) -> None:
    """Register ``dcqfa pack``."""
    parser = subparsers.add_parser(
        "pack",
        help="write a supernet's averaged weights as a small checkpoint",
        description="Write the averaged weights of a supernet run as their difference from the full-precision policy "
        "they started from, about a twentieth of the run's checkpoint. Every command reads the result like a run; "
        "`dcqfa train` goes on from a copy of it with fresh optimizer moments; from a copy of the shipped "
        "models/pusht_keypoints_supernet with --change-length --change-tables, as its tables were measured anew since.",
        epilog="examples: dcqfa pack runs/pusht_keypoints_supernet --out models/pusht_keypoints_supernet; dcqfa pack "
        "runs/pusht_keypoints_opd --against models/pusht_keypoints_supernet --out models/pusht_keypoints_opd",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint file of a supernet")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="SUPERNET",
        help="store the difference from this supernet instead, as a distillation's from its start: several "
        "times less rounded, without the sampler that it left as it was; SUPERNET stays needed",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        help="full-precision policy that reads the result from now on: the one RUN started from, rounded (dcqfa export "
        "--store float16)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the small checkpoint; replaced if there")
    parser.add_argument("--json", action="store_true", help="print file and size as JSON")
    parser.set_defaults(func=_pack)


def _pack(args: argparse.Namespace) -> int:
    from training.checkpoint import CHECKPOINT
    from training.compact import pack as write

    source = args.run / CHECKPOINT if args.run.is_dir() else args.run
    target = args.out / CHECKPOINT
    size = write(source, target, policy=args.policy, against=args.against)
    print(json.dumps({"file": str(target), "bytes": size}) if args.json else f"{target}: {size / 1e6:.1f} MB")
    return 0
