"""Picture of a validation: predicted against measured latency and memory of random networks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from dcqfa_ros.errors import UserError
from training.files import write_atomically

if TYPE_CHECKING:
    from training.profile_validate import Report

BANDS = (0.05, 0.12)  # goals for the mean and the worst error
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
_MEGA = 1e6


class PlotError(UserError):
    """A picture that cannot be made; the message says what is missing."""


def plot_report(report: Report, title: str, path: Path) -> None:
    """Draw predicted against measured latency, and memory, with the identity and the goals for errors.

    Args:
        report: of the validation.
        title: above the picture.
        path: PNG, SVG or PDF file, by its suffix.

    Raises:
        PlotError: matplotlib is missing or cannot write such a file.
        WriteError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError("plot: needs matplotlib; install the requirements of training") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 5.0), layout="constrained")
    for axis, what, unit, scale in ((axes[0], "latency_ms", "ms", 1.0), (axes[1], "memory_bytes", "MB", _MEGA)):
        greatest = 0.0
        for color, (executed, part) in zip(_COLORS, report.by_form.items(), strict=False):
            measured = [getattr(point.measured, what) / scale for point in part]
            predicted = [getattr(point.predicted, what) / scale for point in part]
            axis.scatter(measured, predicted, s=18, color=color, alpha=0.8, label=f"{executed} ({len(part)})")
            greatest = max(greatest, *measured, *predicted)
        line = [0.0, 1.08 * greatest]
        axis.plot(line, line, color="0.3", linewidth=1.0)
        for share, gray in zip(BANDS, ("0.75", "0.88"), strict=True):
            low, high = ([(1.0 + sign * share) * x for x in line] for sign in (-1, 1))
            axis.fill_between(line, low, high, color=gray, alpha=0.6, linewidth=0, label=f"± {share:.0%}", zorder=0)
        name = what.partition("_")[0]
        axis.set_xlabel(f"measured {name} in {unit}")
        axis.set_ylabel(f"predicted {name} in {unit}")
        axis.set_xlim(line)
        axis.set_ylim(line)
        axis.set_aspect("equal")
        axis.grid(alpha=0.3, linewidth=0.4)
    errors = (
        f"one chunk: off by {report.mape:.1%} in the mean, {report.worst:.1%} at most",
        f"at the present speed: {report.present_mape:.1%} in the mean, {report.present_worst:.1%} at most",
        *(f"not comparable: {note.split(': ')[1]} at another speed than the table's" for note in report.notes),
    )
    axes[0].set_title("\n".join(errors), fontsize=9)
    axes[1].set_title(f"engine: off by {report.memory_mape:.1%} in the mean", fontsize=9)
    axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=150, format=path.suffix[1:] or "png")
    except ValueError as error:
        raise PlotError(f"plot: {path}: {error}") from error
    finally:
        pyplot.close(figure)
    write_atomically(path, picture.getvalue())
