"""The curves of a split as pictures: ROC, precision-recall, calibration, confusion; of two classes the positive one, of more each against the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # a figure of its own draws with Agg: no display, no global state
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from clips.files import whole_file

from .metrics import Judged, auroc, average_precision, confusion_of

SIZE_INCH, DPI = (5.0, 4.6), 100
NUM_BINS = 10
MOST_NAMED_CELLS = 20  # classes whose confusion still has room for numbers


def draw_all(judged: Judged, title: str) -> dict[str, Figure]:
    """Name to figure of what the clips allow: a curve needs clips of both kinds, all need a clip and finite probabilities."""
    if not len(judged.labels) or not np.isfinite(judged.probabilities).all():
        return {}
    draw: Mapping[str, Callable[[Axes, Judged], None]] = {"roc": _roc, "pr": _precision_recall, "calibration": _calibration, "confusion": _confusion}
    figures = {}
    for name, drawing in draw.items():
        figure = Figure(figsize=SIZE_INCH, dpi=DPI, layout="constrained")
        axes = figure.subplots()
        drawing(axes, judged)
        axes.set_title(f"{title}, {len(judged.labels)} clips", fontsize=10)
        figures[name] = figure
    return figures


def pictures_of(judged: Judged, title: str) -> dict[str, np.ndarray]:
    """Name to uint8 (H, W, 3) of what the clips allow."""
    return {name: pixels(figure) for name, figure in draw_all(judged, title).items()}


def write_pictures(folder: Path, split: str, pictures: Mapping[str, np.ndarray]) -> None:
    """FOLDER/<split>-<name>.png; the same clips give the same bytes."""
    for name, picture in pictures.items():
        with whole_file(folder / f"{split}-{name}.png") as file:
            Image.fromarray(picture).save(file, "png")


def show_pictures(board: Any, split: str, pictures: Mapping[str, np.ndarray], step: int) -> None:  # Any: a SummaryWriter, which is not typed
    """The pictures to TensorBoard as <split>/<name>."""
    for name, picture in pictures.items():
        board.add_image(f"{split}/{name}", picture, step, dataformats="HWC")  # add_figure would import pyplot, which looks for a display


def pixels(figure: Figure) -> np.ndarray:
    """uint8 (H, W, 3) of the first drawing: the layout of a second one differs a little."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _ranked(judged: Judged) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, bool (N,) and scores (N,) of each counted class that has clips and others beside it."""
    for index in judged.counted:
        is_class = judged.labels == index
        if is_class.any() and not is_class.all():
            yield judged.class_names[index], is_class, judged.probabilities[:, index]


def _roc(axes: Axes, judged: Judged) -> None:
    for name, is_class, scores in _ranked(judged):
        wrong, found, _ = roc_curve(is_class, scores)
        axes.plot(wrong, found, label=f"{name}, area {auroc(is_class, scores):.3f}")
    axes.plot([0, 1], [0, 1], "--", color="0.6", linewidth=1)
    _square(axes, "false positive rate", "true positive rate", "lower right")


def _precision_recall(axes: Axes, judged: Judged) -> None:
    for name, is_class, scores in _ranked(judged):
        precision, recall, _ = precision_recall_curve(is_class, scores)
        (line,) = axes.plot(recall, precision, drawstyle="steps-post", label=f"{name}, average precision {average_precision(is_class, scores):.3f}")
        axes.axhline(is_class.mean(), linestyle="--", color=line.get_color(), linewidth=1, alpha=0.5)  # what chance reaches
    _square(axes, "recall", "precision", "lower left")


def _calibration(axes: Axes, judged: Judged) -> None:
    for index in judged.counted:
        mean, share, _ = calibration(judged.labels == index, judged.probabilities[:, index])
        axes.plot(mean, share, "o-", markersize=4, label=judged.class_names[index])
    axes.plot([0, 1], [0, 1], "--", color="0.6", linewidth=1)
    beneath = axes.twinx()
    scores = judged.probabilities[:, judged.counted].ravel()
    beneath.hist(scores, bins=NUM_BINS, range=(0, 1), color="0.85", zorder=0)
    beneath.set_ylim(0, 4 * beneath.get_ylim()[1])  # the lowest quarter of the picture
    beneath.set_yticks([])
    axes.set_zorder(beneath.get_zorder() + 1)
    axes.patch.set_visible(False)
    _square(axes, "mean probability (bars: clips)", "share of clips of the class", "upper left")


def calibration(is_class: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, share of the class, and clips of each tenth of [0, 1] that has clips; 1 belongs to the last."""
    bins = np.minimum((scores * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    clips = np.bincount(bins, minlength=NUM_BINS)
    there = clips > 0
    mean = np.bincount(bins, scores, NUM_BINS)[there] / clips[there]
    return mean, np.bincount(bins, is_class, NUM_BINS)[there] / clips[there], clips[there]


def _confusion(axes: Axes, judged: Judged) -> None:
    """Counts, coloured by their share of the row."""
    names = list(judged.class_names)
    counts = confusion_of(judged.labels, judged.predictions, len(names))
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MOST_NAMED_CELLS:
        for row, column in np.ndindex(*counts.shape):
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 4 else 90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="prediction", ylabel="label")


def _square(axes: Axes, x: str, y: str, legend_at: Literal["lower right", "lower left", "upper left"]) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc=legend_at)
