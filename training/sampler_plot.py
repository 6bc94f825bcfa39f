"""The picture of a report on samplers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from training.sampler_report import REQUIRED_SHARE, Report, ReportError, summarize


def check_plot(path: Path) -> None:
    """Refuse a file that :func:`plot_report` could not write, before the work that the picture shows; make its folder.

    Raises:
        ReportError: matplotlib is missing, it does not know the suffix, or the folder cannot be written.
    """
    pyplot = _pyplot()
    figure = pyplot.figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    pyplot.close(figure)
    if path.suffix[1:].lower() not in known:
        raise ReportError(
            f"{path}: the plot cannot be written: expected one of the suffixes .{', .'.join(known)}; give another file"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path if path.exists() else path.parent, os.W_OK) and not path.is_dir()
    except OSError as error:
        raise ReportError(f"{path}: the plot cannot be written ({error.strerror}); give another file") from error
    if not writable:
        raise ReportError(f"{path}: the plot cannot be written there; give another file")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError("plot: needs matplotlib; install the requirements of training") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_report(report: Report, path: Path) -> None:
    """Write a picture (format by the suffix): a column per device; share within budget, latency and loss in rows.

    Raises:
        ReportError: matplotlib is missing, or the file cannot be written.
    """
    pyplot = _pyplot()
    means = summarize(report.rows)
    devices = list(dict.fromkeys(row.device for row in report.rows))
    held_out = {row.device for row in report.rows if row.held_out}
    kinds = {row.kind: row.kind + (" (other tables)" if row.other_tables else "") for row in report.rows}
    quantities = [
        ("share_within", "draws within budget"),
        ("latency_over_budget", "mean latency / budget"),
        ("memory_over_budget", "mean memory / budget"),
    ]
    if any(row.loss is not None for row in report.rows):
        quantities.append(("loss", "held-out loss of draws"))
    figure, axes = pyplot.subplots(
        len(quantities),
        len(devices),
        figsize=(3.2 * len(devices) + 0.8, 2.3 * len(quantities) + 0.6),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for column, device in enumerate(devices):
        axes[0][column].set_title(device + (" (held out)" if device in held_out else ""), fontsize=10)
        axes[-1][column].set_xlabel("budget: share of the way\nfrom smallest to largest", fontsize=8)
        for line, (field, label) in enumerate(quantities):
            axis = axes[line][column]
            for kind, legend in kinds.items():
                points = [(m["budget"], m[field]) for m in means if m["device"] == device and m["kind"] == kind]
                points = [(x, y) for x, y in points if y is not None]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=legend) if points else None
            if field == "share_within":
                axis.axhline(REQUIRED_SHARE, color="grey", linewidth=0.8, linestyle="--")
                axis.set_ylim(-0.03, 1.03)
            if column == 0:
                axis.set_ylabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: the plot cannot be written ({error}); give another file, .png or .svg") from error
    finally:
        pyplot.close(figure)
