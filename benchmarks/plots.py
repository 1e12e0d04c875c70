"""Plots of measurements as PNG: labelled points side by side, or bars with their spread; one colour a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # a figure of its own draws with Agg: no display, no global state
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

WIDTH_INCH, HEIGHT_INCH, DPI = 6.0, 4.5, 120
BAR_WIDTH_INCH, BAR_HEIGHT_INCH, AROUND_BARS_INCH = 8.0, 0.42, 1.1


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


@dataclass(frozen=True)
class Bar:
    """One measurement and its least and greatest."""

    label: str
    value: float
    spread: tuple[float, float]
    family: str


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


def draw_bars(path: Path, title: str, x: str, bars: Sequence[Bar], line: float, line_label: str) -> None:
    """Writes horizontal bars, the first on top, each with its value and whiskers from least to greatest, and an upright line at `line`."""
    figure = Figure(figsize=(BAR_WIDTH_INCH, AROUND_BARS_INCH + BAR_HEIGHT_INCH * len(bars)), layout="constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(bar.family for bar in bars))
    for place, bar in enumerate(bars):
        whiskers = [[bar.value - bar.spread[0]], [bar.spread[1] - bar.value]]
        axes.barh(place, bar.value, xerr=whiskers, color=f"C{families.index(bar.family)}", capsize=3, ecolor="0.3", height=0.65)
        axes.annotate(f"{bar.value:.1f}", (bar.spread[1], place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(line, color="0.3", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set(title=title, xlabel=f"{x} (dashed: {line_label})")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
