"""A picture of error-accumulation curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from training.files import write_atomically
from training.search.plots import PlotError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Find out before a long measurement whether its picture can be drawn.

    Raises:
        PlotError: matplotlib is missing, the suffix is of no picture, or there is no such folder.
    """
    if path.suffix not in SUFFIXES:
        raise PlotError(f"--plot {path}: expected a file name that ends in {', '.join(SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise PlotError(f"--plot {path}: there is no folder {path.parent}; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError(
            "pictures need matplotlib; install the requirements of training (requirements/train.txt)"
        ) from error


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the result of :func:`training.deviation.measure`: states over steps, actions over policy calls.

    Raises:
        PlotError: see :func:`check_plot`.
        WriteError: the file cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11.0, 4.4), layout="constrained")
    for index, entry in enumerate(result["contenders"]):
        color = f"C{index}"
        _line(axes[0], entry["curves"]["keypoints_px"], color, "-", entry["name"])
        for kind, style in (("own_states", "-"), ("teacher_states", ":")):
            _line(axes[1], entry["action_px"][kind], color, style, f"{entry['name']}, {kind.replace('_', ' ')}")
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("key points apart from the teacher's, px")
    axes[1].set_xlabel("policy call")
    axes[1].set_ylabel("executed actions apart from the teacher's, px")
    for axis in axes:
        axis.set_ylim(bottom=0.0)
        axis.grid(alpha=0.3, linewidth=0.4)
        axis.legend(fontsize=7)
    first, last = result["seeds"]
    against = f"against {result['teacher']['name']}, {result['count']} seeds {first} to {last}, bands 95 %"
    figure.suptitle(against, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:])
    pyplot.close(figure)
    write_atomically(path, picture.getvalue())


def _line(axis: Any, curve: dict[str, list[Any]], color: str, style: str, label: str) -> None:
    known = [k for k, half in enumerate(curve["ci95"]) if half is not None]
    mean, half = ([curve[name][k] for k in known] for name in ("mean", "ci95"))
    axis.plot(known, mean, style, color=color, linewidth=1.3, label=label)
    if style == "-":
        low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1.0, 1.0))
        axis.fill_between(known, low, high, color=color, alpha=0.15, linewidth=0.0)
