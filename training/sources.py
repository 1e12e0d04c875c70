"""How a model fares on each source: one row of a CSV file a source."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clips.files import write_whole

from .metrics import Judged


def write_sources(path: Path, judged: Judged) -> None:
    """source, clips, accuracy, and of each counted class (of two the positive one) its clips, those taken for it, and its mean probability."""
    names = [judged.class_names[index] for index in judged.counted]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "clips", "accuracy", *(f"{column}_{name}" for name in names for column in ("clips", "predicted", "mean_p"))])
    writer.writerows(source_rows(judged))
    write_whole(path, text.getvalue().encode())


def source_rows(judged: Judged) -> Iterator[list[str | int]]:
    """The lines below the header, sources sorted by name."""
    names, source_of_clip = np.unique(np.asarray(judged.sources, dtype=str), return_inverse=True)
    for number, name in enumerate(names.tolist()):
        chosen = source_of_clip == number
        labels, predictions, scores = judged.labels[chosen], judged.predictions[chosen], judged.probabilities[chosen]
        row: list[str | int] = [name, len(labels), f"{(labels == predictions).mean():.4f}"]
        for index in judged.counted:
            row += [int((labels == index).sum()), int((predictions == index).sum()), f"{scores[:, index].mean():.4f}"]
        yield row
