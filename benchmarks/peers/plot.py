"""Bars of a summary: real tokens per second of every engine, a panel for each workload of each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.summary import Row

OWN, BEST, OTHER = "#d9480f", "#5c6b7a", "#c3cad1"


def plot(rows: Sequence[Row], path: Path, title: str, ours: str) -> str:
    """Draws; "" or in words why there is no plot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    drawn = [row for row in rows if row.seconds is not None]
    if not drawn:
        return "no plot: no engine ran"
    models = list(dict.fromkeys(row.model for row in drawn))
    workloads = list(dict.fromkeys(row.workload for row in drawn))
    most = max(sum((r.model, r.workload) == (m, w) for r in drawn) for m in models for w in workloads)
    size = (7.5 * len(models), 0.8 + (0.9 + 0.3 * most) * len(workloads))
    figure, axes = pyplot.subplots(len(workloads), len(models), figsize=size, squeeze=False, layout="constrained")
    for line, workload in zip(axes, workloads, strict=True):
        for axis, model in zip(line, models, strict=True):
            panel(axis, [row for row in drawn if (row.model, row.workload) == (model, workload)], ours)
            axis.set_title(f"{model}, {workload}", loc="left", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("real tokens per second; dark: the best peer, ×: over it")
    figure.suptitle(title, fontsize=12, x=0.015, ha="left", weight="bold")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        return f"no plot: {error}"
    finally:
        pyplot.close(figure)
    return ""


def panel(axis: Any, rows: Sequence[Row], ours: str) -> None:
    """Horizontal bars, a group for each precision."""
    place, places, labels = 0.0, [], []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        for row in (row for row in rows if row.dtype == dtype):
            rate = row.tokens_per_second or 0.0
            own, best = row.engine == ours, row.title == row.best_peer
            axis.barh(place, rate, height=0.8, color=OWN if own else BEST if best else OTHER)
            times = f"  (×{row.times_best_peer:.2f})" if own and row.times_best_peer else ""
            axis.text(rate, place, f" {rate:,.0f}{times}", va="center", fontsize=8, weight="bold" if own else "normal")
            places.append(place)
            labels.append(f"{row.title}  {dtype}")
            place += 1.0
        place += 0.6
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlim(left=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
