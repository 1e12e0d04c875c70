"""Plots of measurements as PNG, side by side: labelled points, one colour a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # a figure of its own draws with Agg: no display, no global state
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

WIDTH_INCH, HEIGHT_INCH, DPI = 6.0, 4.5, 120


@dataclass(frozen=True)
class Point:
    """One measurement; points of one family are joined in their order. `side` is where its label stands: right or left, above or below."""

    x: float
    y: float
    label: str
    family: str
    side: tuple[Literal[1, -1], Literal[1, -1]] = (1, 1)


@dataclass(frozen=True)
class Panel:
    """One plot; `x` is drawn with a logarithmic axis, `y` with a linear one, which may begin at zero."""

    title: str
    x: str
    y: str
    points: Sequence[Point]
    from_zero: bool = False


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Writes the panels beside each other; the same points give the same picture."""
    figure = Figure(figsize=(WIDTH_INCH * len(panels), HEIGHT_INCH), layout="constrained")
    families = list(dict.fromkeys(point.family for panel in panels for point in panel.points))
    colours = {family: f"C{number}" for number, family in enumerate(families)}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, panel, colours)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _panel(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    for family, colour in colours.items():
        points = [point for point in panel.points if point.family == family]
        axes.plot([point.x for point in points], [point.y for point in points], "o-", color=colour, label=family if points else None)
        for point in points:
            right, up = point.side
            across, along = ("left" if right > 0 else "right"), ("bottom" if up > 0 else "top")
            offset, at = (6 * right, 5 * up), (point.x, point.y)
            axes.annotate(point.label, at, xytext=offset, textcoords="offset points", ha=across, va=along, fontsize=8, color=colour)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.margins(x=0.15, y=0.1)
    if panel.from_zero:
        axes.set_ylim(0, 1.1 * max(point.y for point in panel.points))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
