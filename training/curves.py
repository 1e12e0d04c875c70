"""The curves of runs side by side: train's loss and a metric on val, epoch by epoch, one colour a group."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # a figure of its own draws with Agg: no display, no global state

from clips.files import write_whole

if TYPE_CHECKING:
    from .compare import Group

SIZE_INCH, DPI = (11.0, 4.6), 110
MOST_LETTERS = 60  # of a group's settings in the legend


def draw_curves(path: Path, groups: Sequence[Group], metric: str) -> None:
    """A PNG; the best epoch of each run is a dot, unfinished runs are dashed."""
    figure = Figure(figsize=SIZE_INCH, dpi=DPI, layout="constrained")
    loss, val = figure.subplots(1, 2)
    for place, group in enumerate(groups):
        for number, run in enumerate(group.runs):
            line = "-" if run.is_finished else "--"
            style: dict[str, Any] = {"color": f"C{place % 10}", "linestyle": line, "linewidth": 1.2, "marker": "."}  # Any: what plot takes
            settings = group.settings if len(group.settings) <= MOST_LETTERS else group.settings[: MOST_LETTERS - 1] + "…"
            _curve(loss, run.lines, "epoch/loss", style, None)
            _curve(val, run.epochs, f"val/{metric}", style, f"{place + 1}. {settings}" if number == 0 else None)
            if run.best and run.best.get(f"val/{metric}") is not None:
                val.plot(run.best["epoch"], run.best[f"val/{metric}"], "o", color=style["color"], markersize=5)
    loss.set(title="loss on train", xlabel="epoch", ylabel="loss")
    val.set(title=f"{metric.replace('_', ' ')} on val (dot: best epoch)", xlabel="epoch", ylabel=metric.replace("_", " "))
    for axes in (loss, val):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if val.get_legend_handles_labels()[0]:
        val.legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    write_whole(path, file.getvalue())


def _curve(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, style: Mapping[str, Any], text: str | None) -> None:  # Any: as above
    points = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
    axes.plot([epoch for epoch, _ in points], [value for _, value in points], label=text, **style)
