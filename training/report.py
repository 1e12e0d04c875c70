"""All that is said of a split once a model is chosen: metrics with intervals, F1 at val's threshold, a table of sources, pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .bootstrap import intervals
from .evaluation import in_words
from .metrics import Judged, Prediction, write_predictions
from .sources import write_sources
from .threshold import Threshold, at_threshold, read_threshold

logger = logging.getLogger(__name__)


class Folder(Protocol):
    """What is used of a run folder."""

    path: Path

    def log(self, record: Mapping[str, Any]) -> None: ...  # Any: JSON values

    def show(self, split: str, pictures: Mapping[str, np.ndarray], step: int) -> None: ...


def report(folder: Folder, split: str, step: int, epoch: int, judged: Judged, metrics: Mapping[str, Any], rows: Sequence[Prediction]) -> None:
    """All of a split into the run folder: a line of metrics.jsonl, predictions-<split>.csv, sources-<split>.csv, plots/ and TensorBoard; a line in the log."""
    found = detailed(metrics, judged, read_threshold(folder.path, judged.positive))
    folder.log({"step": step, "epoch": epoch} | {f"{split}/{name}": value for name, value in found.items() if name != "notes"})
    write_predictions(folder.path / f"predictions-{split}.csv", rows, judged.class_names)
    folder.show(split, write_report(folder.path, split, judged, f"{folder.path.name}: {split}, best epoch"), step)
    logger.info(f"{split}, best epoch: {in_words(found)}")


def detailed(metrics: Mapping[str, Any], judged: Judged, threshold: Threshold | None) -> dict[str, Any]:  # Any: as `evaluate`
    """The metrics of these clips with `intervals` by name, and those at val's threshold where there is one."""
    if not len(judged.labels) or not np.isfinite(judged.probabilities).all():
        return {**metrics, "intervals": {}}
    value = None if threshold is None else threshold.value
    found = intervals(judged, value)
    at_value = {} if value is None else at_threshold(judged, value)
    known = {name: list(ends) for name, ends in found.ends.items() if ends is not None}
    return {**metrics, **at_value, "intervals": known, "notes": [*metrics["notes"], *found.notes]}


def write_report(run: Path, name: str, judged: Judged, title: str) -> dict[str, np.ndarray]:
    """RUN/sources-<name>.csv and RUN/plots/<name>-{roc,pr,calibration,confusion}.png; the pictures uint8 (H, W, 3), for TensorBoard."""
    from .plots import pictures_of, write_pictures  # 0.4 s, and only at the end of a run

    write_sources(run / f"sources-{name}.csv", judged)
    pictures = pictures_of(judged, title)
    write_pictures(run / "plots", name, pictures)
    return pictures
