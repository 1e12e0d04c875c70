"""What a model is worth on a split, and the table of its predictions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from clips.errors import InputError
from clips.files import whole_file

METRICS = ("loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision")
SMALLEST_PROBABILITY = 1e-12  # a probability of 0 for the true class would make the loss of a whole split infinite
FIRST_COLUMNS = ("key", "split", "label", "prediction")
LAST_COLUMNS = ("source", "begin_ms", "end_ms")


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Judged:
    """Clips with known labels int64 (N,), probabilities float64 (N, K) and sources (N,): those of a split that were read.

    `positive` is the positive class of two, by default the last.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    sources: Sequence[str]
    class_names: Sequence[str]
    positive: str | None = None

    @property
    def counted(self) -> list[int]:
        """The classes whose F1, AUROC and average precision count."""
        return counted_classes(self.class_names, self.positive)

    @property
    def predictions(self) -> np.ndarray:
        """int64 (N,): the most probable class, the earlier one of equals."""
        return self.probabilities.argmax(axis=1)


def evaluate(labels: npt.ArrayLike, probabilities: npt.ArrayLike, class_names: Sequence[str], positive: str | None = None) -> dict[str, float | list | None]:
    """The metrics of labels int (N,) and probabilities (N, K); what is undefined is None, with its reason in `notes`.

    Accuracy, balanced accuracy, F1 and confusion (rows: label, columns: prediction) use the most probable class, the earlier one of equals.
    Two classes: F1, AUROC and average precision of the class `positive`, by default the last. More: the mean over the classes, each against
    the rest. The loss is the mean of -log p(label). AUROC counts equal scores as half.
    """
    truth, scores, num_classes = np.asarray(labels, dtype=np.int64), np.asarray(probabilities, dtype=np.float64), len(class_names)
    check_shapes(truth, scores, num_classes, class_names, positive)
    if len(truth) == 0:
        return undefined("the split has no clips.")
    if num_bad := int((~np.isfinite(scores)).any(axis=1).sum()):
        return undefined(f"{num_bad} of {len(truth)} clips have a probability that is not finite: the model diverged.")
    predictions = scores.argmax(axis=1)
    confusion = confusion_of(truth, predictions, num_classes)
    counted = counted_classes(class_names, positive)
    return {
        "loss": float(-np.log(np.maximum(scores[np.arange(len(truth)), truth], SMALLEST_PROBABILITY)).mean()),
        "accuracy": float((predictions == truth).mean()),
        "balanced_accuracy": mean_or_none([recall(confusion, index) for index in range(num_classes)]),
        "f1": mean_or_none([f1(confusion, index) for index in counted]),
        "auroc": mean_or_none([auroc(truth == index, scores[:, index]) for index in counted]),
        "average_precision": mean_or_none([average_precision(truth == index, scores[:, index]) for index in counted]),
        "confusion": confusion.tolist(),
        "notes": notes(confusion, class_names, counted),
    }


def confusion_of(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (K, K): the clips of each label, down, and prediction, across."""
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def counted_classes(class_names: Sequence[str], positive: str | None) -> list[int]:
    """The classes whose F1, AUROC and average precision count: of two the positive one, of more all."""
    if len(class_names) != 2:
        return list(range(len(class_names)))
    return [1 if positive is None else list(class_names).index(positive)]


def check_shapes(labels: np.ndarray, probabilities: np.ndarray, num_classes: int, class_names: Sequence[str], positive: str | None) -> None:
    """Raises ValueError for arrays that do not belong together, InputError for a positive class that does not exist."""
    if labels.ndim != 1 or probabilities.shape != (len(labels), num_classes):
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape}: expected (N,) and (N, {num_classes}).")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: expected 0 to {num_classes - 1}.")
    if positive is not None and positive not in class_names:
        raise InputError(f"positive class {positive!r}: expected one of {', '.join(class_names)}.")


def undefined(reason: str) -> dict[str, float | list | None]:
    """All metrics None, for one reason."""
    return {**dict.fromkeys((*METRICS, "confusion")), "notes": [reason]}


def recall(confusion: np.ndarray, index: int) -> float | None:
    """The share of the class's clips that were found; None without such clips."""
    clips = int(confusion[index].sum())
    return float(confusion[index, index] / clips) if clips else None


def f1(confusion: np.ndarray, index: int) -> float | None:
    """2 TP / (2 TP + FP + FN); None for a class without clips, whose F1 says nothing about the model."""
    clips = int(confusion[index].sum())
    return float(2 * confusion[index, index] / (clips + confusion[:, index].sum())) if clips else None


def auroc(is_class: np.ndarray, scores: np.ndarray) -> float | None:
    """The chance that a clip of the class scores above another; None when one of both kinds is missing."""
    return float(roc_auc_score(is_class, scores)) if 0 < is_class.sum() < len(is_class) else None


def average_precision(is_class: np.ndarray, scores: np.ndarray) -> float | None:
    """The area under the precision-recall steps; None without clips of the class."""
    return float(average_precision_score(is_class, scores)) if is_class.any() else None


def mean_or_none(values: list[float | None]) -> float | None:
    """The mean, or None when one value is: a mean over fewer classes would be another quantity under the same name."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def notes(confusion: np.ndarray, class_names: Sequence[str], counted: list[int]) -> list[str]:
    """Why metrics are None."""
    reasons = []
    for index, name in enumerate(class_names):
        if confusion[index].sum() == 0:
            lost = "balanced accuracy, F1, AUROC and average precision" if index in counted else "balanced accuracy and AUROC"
            reasons.append(f"no clip of class {name} in this split: {lost} are undefined.")
    if len(class_names) == 1:
        reasons.append("there is one class only: AUROC is undefined.")
    return reasons


@dataclass(frozen=True)
class Prediction:
    """One clip's row: `label` is the class's index, None where it is unknown; `probabilities` (K,) is None for a clip that could not be read."""

    key: str
    split: str
    label: int | None
    probabilities: Sequence[float] | None
    source: str | None = None
    begin_ms: float | None = None
    end_ms: float | None = None


def write_predictions(path: Path, rows: Iterable[Prediction], class_names: Sequence[str]) -> None:
    """A CSV file with names of classes instead of numbers; probabilities keep all bits of fp32 (9 digits)."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *(f"p_{name}" for name in class_names), *LAST_COLUMNS])
    for row in rows:
        label = "" if row.label is None else class_names[row.label]
        scores = [""] * len(class_names) if row.probabilities is None else [f"{p:.9g}" for p in row.probabilities]
        prediction = "" if row.probabilities is None else class_names[int(np.argmax(row.probabilities))]
        writer.writerow([row.key, row.split, label, prediction, *scores, row.source, row.begin_ms, row.end_ms])  # csv writes None as empty
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
