"""What training wrote, read back with plain csv."""

from __future__ import annotations

import csv
from pathlib import Path

from training.metrics import Prediction


def read_predictions(path: Path) -> tuple[list[Prediction], tuple[str, ...]]:
    """The rows of a predictions file, and the class names in label order."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    names = tuple(name.removeprefix("p_") for name in lines[0] if name.startswith("p_"))
    return [_row(cells, names) for cells in lines], names


def _row(cells: dict[str, str], names: tuple[str, ...]) -> Prediction:
    label = names.index(cells["label"]) if cells["label"] else None
    probabilities = [float(cells[f"p_{name}"]) for name in names] if cells[f"p_{names[0]}"] else None
    begin_ms, end_ms = (float(cells[name]) if cells[name] else None for name in ("begin_ms", "end_ms"))
    return Prediction(cells["key"], cells["split"], label, probabilities, cells["source"] or None, begin_ms, end_ms)
