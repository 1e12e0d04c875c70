"""The probability from which a clip counts as positive: chosen on val, kept with the run, applied to test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clips.errors import InputError
from clips.files import write_json

from .metrics import Judged

FILE = "threshold.json"
EVEN = 0.5  # the most probable of two classes


@dataclass(frozen=True)
class Threshold:
    """A clip is `positive` when that class's probability is at least `value`; `f1` is what the threshold reached where it was chosen."""

    value: float
    positive: str
    f1: float
    epoch: int | None = None


def best_threshold(judged: Judged, epoch: int | None = None) -> Threshold | None:
    """The threshold with the highest F1: the middle of the interval of probabilities that give it, of several intervals the one with its middle nearest 1/2.

    None for other than two classes, without a clip of the positive one, and for a model that diverged.
    """
    if len(judged.class_names) != 2 or not np.isfinite(judged.probabilities).all():
        return None
    (index,) = judged.counted
    is_class, scores = judged.labels == index, judged.probabilities[:, index]
    if not is_class.any():
        return None
    steps, num_taken, hits = _by_step(is_class, scores)
    f1 = 2 * hits / (num_taken + is_class.sum())  # of whole numbers: equal fractions are equal floats
    is_best = f1 == f1.max()
    lower = np.append(steps[1:], 0.0)  # step i holds for thresholds above steps[i + 1] up to steps[i]
    begins = np.flatnonzero(is_best & ~np.r_[False, is_best[:-1]])
    ends = np.flatnonzero(is_best & ~np.r_[is_best[1:], False])
    middles = [_middle(lower[end], steps[begin]) for begin, end in zip(begins, ends, strict=True)]
    return Threshold(min(middles, key=lambda value: abs(value - EVEN)), judged.class_names[index], float(f1.max()), epoch)


def _by_step(is_class: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct scores, falling, and how many clips reach each, of all and of the class."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.flatnonzero(np.r_[np.diff(falling) < 0, True])
    return falling[last], last + 1, np.cumsum(is_class[order])[last]


def _middle(above: float, until: float) -> float:
    """Between two neighbouring floats there is none: then the upper one, for the lower is outside."""
    middle = (float(above) + float(until)) / 2
    return middle if middle > above else float(until)


def at_threshold(judged: Judged, threshold: float) -> dict[str, Any]:  # Any: as `evaluate`
    """`threshold`, and F1, accuracy, precision and recall of the positive one of two classes at it; None where undefined."""
    (index,) = judged.counted
    is_class, is_taken = judged.labels == index, judged.probabilities[:, index] >= threshold
    hits, clips, taken = int((is_class & is_taken).sum()), int(is_class.sum()), int(is_taken.sum())
    return {
        "threshold": threshold,
        "f1_at_threshold": 2 * hits / (clips + taken) if clips else None,
        "accuracy_at_threshold": float((is_class == is_taken).mean()) if len(is_class) else None,
        "precision_at_threshold": hits / taken if taken else None,
        "recall_at_threshold": hits / clips if clips else None,
    }


def write_threshold(run: Path, threshold: Threshold | None) -> None:
    """RUN/threshold.json; none leaves no file of an earlier epoch behind."""
    if threshold is None:
        (run / FILE).unlink(missing_ok=True)
    else:
        write_json(run / FILE, asdict(threshold))


def read_threshold(run: Path, positive: str | None = None) -> Threshold | None:
    """The run's threshold, or None where it has none; InputError for a damaged file and for another positive class than asked."""
    path = run / FILE
    if not path.exists():
        return None
    try:
        stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        threshold = Threshold(float(stored["value"]), str(stored["positive"]), float(stored["f1"]), stored.get("epoch"))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected a threshold as train.py writes it ({error!r}). Remove the file to take {EVEN}.") from error
    if positive is not None and threshold.positive != positive:
        raise InputError(f"{path}: is of class {threshold.positive}; the run's positive class is {positive}. Remove the file to take {EVEN}.")
    return threshold
