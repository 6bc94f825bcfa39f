"""Pictures of a search: a PNG for documents and an interactive page."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcqfa_ros.errors import UserError
from training.files import write_atomically
from training.search.front import Point
from training.search.mixed import METHODS, Allocation, MixedOutcome
from training.search.run import Outcome

MEGA = 1e6
COLORS = dict(zip(METHODS, ("tab:blue", "tab:orange", "tab:red"), strict=True))


class PlotError(UserError):
    """A picture that cannot be made; the message says what is missing."""


def plot_png(outcome: Outcome, title: str, budgets: tuple[float | None, float | None], path: Path) -> None:
    """Draw distance against latency and against memory.

    Args:
        outcome: of the search.
        title: above the picture.
        budgets: milliseconds and bytes; None for any.
        path: the file; its suffix says the format.

    Raises:
        PlotError: matplotlib is missing.
        WriteError: the file cannot be written.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11.0, 4.6), layout="constrained", sharey=True)
    for axis, label, column, budget in (
        (axes[0], "predicted latency of a chunk in ms", 0, budgets[0]),
        (axes[1], "predicted memory in MB", 1, None if budgets[1] is None else budgets[1] / MEGA),
    ):

        def coordinates(points: Sequence[Point], column: int = column) -> tuple[list[float], list[float]]:
            costs = [(point.latency_ms, point.memory_bytes / MEGA)[column] for point in points]
            return costs, [point.distance for point in points]

        axis.scatter(*coordinates(outcome.points), s=5, color="0.75", label=f"measured ({outcome.measured})")
        if outcome.random_front:
            label_random = f"random search ({outcome.random_measured})"
            axis.scatter(*coordinates(outcome.random_front), s=18, marker="x", color="tab:orange", label=label_random)
        axis.scatter(*coordinates(outcome.front), s=18, color="tab:blue", label="front")
        for name, point in outcome.uniform.items():
            x, y = coordinates([point])
            axis.scatter(x, y, s=45, marker="D", facecolor="none", edgecolor="tab:red")
            axis.annotate(
                name, (x[0], y[0]), xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=8, color="tab:red"
            )
        if budget is not None:
            axis.axvline(budget, color="0.4", linestyle="--", linewidth=1.0)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axes[0].set_ylabel("distance to the teacher")
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(pyplot, figure, path)


def plot_mixed(outcome: MixedOutcome, title: str, path: Path) -> None:
    """Draw distance against average bits for searched, greedy and uniform allocations.

    Raises:
        PlotError: matplotlib is missing.
        WriteError: the file cannot be written.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, color in COLORS.items():
        points: list[Allocation] = getattr(outcome, name)
        line = "" if name == "uniform" else "-"
        axis.plot(
            [p.bits for p in points],
            [p.distance for p in points],
            marker="o",
            markersize=4,
            linestyle=line,
            label=name,
            color=color,
        )
    axis.set_yscale("log")
    axis.set_xlabel("average bits of weights and activations")
    axis.set_ylabel("distance to the teacher")
    axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axis.legend()
    axis.set_title(title, fontsize=10)
    _save(pyplot, figure, path)


def plot_mixed_scores(scores: Mapping[str, Mapping[float, tuple[float, float]]], title: str, path: Path) -> None:
    """Draw closed-loop score against average bits.

    Args:
        scores: by method and bits: mean and half-width of its 95 % interval.
        title: above the picture.
        path: the file.

    Raises:
        PlotError: matplotlib is missing.
        WriteError: the file cannot be written.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for place, (name, rows) in enumerate(scores.items()):
        shift = 0.04 * (place - 1)  # intervals of equal bits side by side
        axis.errorbar(
            [bits + shift for bits in rows],
            [mean for mean, _ in rows.values()],
            yerr=[half for _, half in rows.values()],
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
            color=COLORS[name],
        )
    axis.set_xlabel("average bits of weights and activations, at most")
    axis.set_ylabel("mean score, 95 % interval")
    axis.grid(alpha=0.3, linewidth=0.4)
    axis.legend()
    axis.set_title(title, fontsize=10)
    _save(pyplot, figure, path)


def _pyplot() -> Any:
    check_plotting()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:])
    pyplot.close(figure)
    write_atomically(path, picture.getvalue())


def check_plotting() -> None:
    """Find out before a long search whether its pictures can be drawn.

    Raises:
        PlotError: matplotlib or plotly is missing.
    """
    for name in ("matplotlib", "plotly"):
        if importlib.util.find_spec(name) is None:
            raise PlotError(f"pictures need {name}; install the requirements of training (requirements/train.txt)")


def plot_html(outcome: Outcome, title: str, path: Path) -> None:
    """Write a page that needs no network: distance over latency, memory as colour, names under the pointer.

    Raises:
        PlotError: plotly is missing.
        WriteError: the file cannot be written.
    """
    check_plotting()
    from plotly import graph_objects

    figure = graph_objects.Figure()
    on_front = {point.subnet for point in outcome.front}
    for name, points, marker in (
        ("measured", [p for p in outcome.points if p.subnet not in on_front], {"size": 4, "color": "lightgrey"}),
        ("random search, front", outcome.random_front, {"size": 7, "symbol": "x", "color": "darkorange"}),
        (
            "front",
            outcome.front,
            {
                "size": 8,
                "color": [point.memory_bytes / MEGA for point in outcome.front],
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": "MB"}},
                "line": {"width": 1, "color": "black"},
            },
        ),
        ("uniform", list(outcome.uniform.values()), {"size": 11, "symbol": "diamond-open", "color": "red"}),
    ):
        figure.add_trace(
            graph_objects.Scatter(
                x=[point.latency_ms for point in points],
                y=[point.distance for point in points],
                mode="markers+text" if name == "uniform" else "markers",
                textposition="top right",
                name=name,
                marker=marker,
                text=list(outcome.uniform) if name == "uniform" else None,
                customdata=[(point.subnet, point.memory_bytes / MEGA) for point in points],
                hovertemplate="%{customdata[0]}<br>%{x:.3f} ms, %{customdata[1]:.2f} MB<br>distance %{y:.3g}"
                "<extra></extra>",
            )
        )
    figure.update_layout(
        title={"text": title},
        xaxis_title="predicted latency of a chunk in ms",
        yaxis_title="distance to the teacher",
        yaxis_type="log",
        template="plotly_white",
        legend={"orientation": "h", "y": -0.15},
    )
    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())
