"""Metrics against brute force over pairs and thresholds, and the predictions file against what was written."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips.errors import InputError
from tests.reading import read_predictions
from training.metrics import Prediction, evaluate, write_predictions

NAMES = ("nongesture", "gesture")


def binary(scores: list[float]) -> np.ndarray:
    """Probabilities (N, 2) from those of class 1."""
    return np.stack([1 - np.array(scores), np.array(scores)], axis=1)


def pairs_auroc(is_class: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a clip of the class scores above another, equal scores half, by going through all pairs."""
    wins = [(a > b) + (a == b) / 2 for a in scores[is_class] for b in scores[~is_class]]
    return sum(wins) / len(wins)


def steps_average_precision(is_class: np.ndarray, scores: np.ndarray) -> float:
    """The sum of precision times the gain in recall, threshold by threshold; equal scores come together."""
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = is_class[scores >= threshold]
        recall = found.sum() / is_class.sum()
        area, recall_before = area + found.mean() * (recall - recall_before), recall
    return area


def counted_f1(labels: np.ndarray, predictions: np.ndarray, index: int) -> float:
    """F1 from counts."""
    hits = sum((labels == index) & (predictions == index))
    return 2 * hits / (sum(labels == index) + sum(predictions == index))


two_classes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=40).filter(lambda rows: len({label for label, _ in rows}) == 2)


@settings(deadline=None)
@given(two_classes)
def test_two_classes_equal_brute_force_also_with_ties(rows: list[tuple[int, int]]) -> None:
    labels, scores = np.array([label for label, _ in rows]), np.array([score / 8 for _, score in rows])
    found: dict = evaluate(labels, binary(list(scores)), NAMES)
    predictions = (scores > 0.5).astype(int)  # an even chance is the earlier class
    recalls = [np.mean(predictions[labels == index] == index) for index in (0, 1)]
    expected_loss = -np.mean([math.log(max(1e-12, score if label else 1 - score)) for label, score in zip(labels, scores, strict=True)])
    assert found["loss"] == pytest.approx(expected_loss)
    assert found["accuracy"] == pytest.approx(np.mean(predictions == labels))
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["f1"] == pytest.approx(counted_f1(labels, predictions, 1))
    assert found["auroc"] == pytest.approx(pairs_auroc(labels == 1, scores))
    assert found["average_precision"] == pytest.approx(steps_average_precision(labels == 1, scores))
    assert found["confusion"] == [[int(sum((labels == row) & (predictions == column))) for column in (0, 1)] for row in (0, 1)]
    assert found["notes"] == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), min_size=3, max_size=30))
def test_three_classes_are_the_mean_of_each_against_the_rest(rows: list[tuple[int, int, int, int]]) -> None:
    rows = [*rows, (0, 1, 1, 1), (1, 1, 1, 1), (2, 1, 1, 1)]
    labels, weights = np.array([row[0] for row in rows]), np.array([row[1:] for row in rows], dtype=float)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    found: dict = evaluate(labels, probabilities, ("a", "b", "c"))
    predictions = probabilities.argmax(axis=1)
    assert found["f1"] == pytest.approx(np.mean([counted_f1(labels, predictions, index) for index in range(3)]))
    assert found["auroc"] == pytest.approx(np.mean([pairs_auroc(labels == index, probabilities[:, index]) for index in range(3)]))
    assert found["average_precision"] == pytest.approx(np.mean([steps_average_precision(labels == index, probabilities[:, index]) for index in range(3)]))


def test_a_case_by_hand() -> None:
    # gesture scores .9 and .4, nongesture .6 and .1: of 4 pairs one is lost; precision is 1 at recall 1/2, 2/3 at recall 1
    found: dict = evaluate(np.array([1, 0, 1, 0]), binary([0.9, 0.6, 0.4, 0.1]), NAMES)
    assert found["auroc"] == pytest.approx(3 / 4)
    assert found["average_precision"] == pytest.approx(1 / 2 + 2 / 3 / 2)
    assert found["confusion"] == [[1, 1], [1, 1]]
    assert found["accuracy"] == found["f1"] == found["balanced_accuracy"] == pytest.approx(0.5)
    assert found["loss"] == pytest.approx(-(math.log(0.9) * 2 + math.log(0.4) * 2) / 4)


def test_the_positive_class_can_be_the_first() -> None:
    labels, scores = np.array([1, 1, 1, 0]), [0.9, 0.8, 0.7, 0.6]
    assert evaluate(labels, binary(scores), NAMES)["average_precision"] == pytest.approx(1)
    flipped = evaluate(labels, binary(scores), NAMES, positive="nongesture")
    assert flipped["average_precision"] == pytest.approx(1)
    assert flipped["f1"] == 0.0
    assert evaluate(labels, binary(scores), NAMES, positive="gesture")["f1"] == pytest.approx(6 / 7)
    with pytest.raises(InputError, match="positive class 'wave'"):
        evaluate(labels, binary(scores), NAMES, positive="wave")


def test_no_clip_of_the_positive_class_leaves_what_is_defined() -> None:
    found: dict = evaluate(np.array([0, 0]), binary([0.2, 0.7]), NAMES)
    assert (found["accuracy"], found["confusion"]) == (0.5, [[1, 1], [0, 0]])
    assert [found[name] for name in ("balanced_accuracy", "f1", "auroc", "average_precision")] == [None] * 4
    assert found["notes"] == ["no clip of class gesture in this split: balanced accuracy, F1, AUROC and average precision are undefined."]


def test_no_clip_of_the_other_class_leaves_what_is_defined() -> None:
    found: dict = evaluate(np.array([1, 1]), binary([0.2, 0.7]), NAMES)
    assert (found["f1"], found["average_precision"]) == (pytest.approx(2 / 3), 1.0)
    assert found["balanced_accuracy"] is None and found["auroc"] is None
    assert found["notes"] == ["no clip of class nongesture in this split: balanced accuracy and AUROC are undefined."]


def test_a_split_of_a_single_class_has_no_auroc_and_says_why_without_a_warning() -> None:
    found: dict = evaluate(np.array([0, 0]), np.ones((2, 1)), ("gesture",))
    assert (found["auroc"], found["confusion"], found["accuracy"]) == (None, [[2]], 1.0)
    assert found["notes"] == ["there is one class only: AUROC is undefined."]


def test_an_absent_class_of_three_makes_the_means_undefined() -> None:
    found: dict = evaluate(np.array([0, 1]), np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), ("a", "b", "c"))
    assert found["auroc"] is None and found["f1"] is None
    assert found["accuracy"] == 0.5
    assert len(found["notes"]) == 1 and "class c" in found["notes"][0]


def test_no_clips_and_a_diverged_model_give_reasons() -> None:
    empty: dict = evaluate(np.zeros(0, dtype=int), np.zeros((0, 2)), NAMES)
    assert empty["accuracy"] is None and empty["notes"] == ["the split has no clips."]
    diverged: dict = evaluate(np.array([0, 1, 1]), binary([0.1, math.nan, 0.3]), NAMES)
    assert diverged["auroc"] is None and diverged["notes"][0].startswith("1 of 3 clips")


def test_a_sure_and_wrong_clip_has_a_finite_loss() -> None:
    assert evaluate(np.array([1, 0]), binary([0.0, 0.0]), NAMES)["loss"] == pytest.approx(-math.log(1e-12) / 2)


@pytest.mark.parametrize(("labels", "shape"), [([0, 1], (3, 2)), ([0, 1], (2, 3)), ([0, 2], (2, 2)), ([-1, 0], (2, 2))])
def test_arrays_that_do_not_belong_together_are_errors(labels: list[int], shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        evaluate(np.array(labels), np.full(shape, 0.5), NAMES)


ROWS = [
    Prediction("val/gesture/000000012_x", "val", 1, [0.25, 0.75], "x", 15600, 16900.5),
    Prediction('val/gesture/with "quotes", comma', "val", 0, [1 / 3, 2 / 3]),
    Prediction("val/gesture/unreadable", "val", 1, None, "x"),
    Prediction("unknown/ä", "unknown", None, [0.5, 0.5]),
]


def test_predictions_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "predictions-val.csv"
    write_predictions(path, iter(ROWS), NAMES)
    rows, class_names = read_predictions(path)
    assert class_names == NAMES
    assert [(row.key, row.split, row.label, row.source, row.begin_ms, row.end_ms) for row in rows] == [
        (row.key, row.split, row.label, row.source, row.begin_ms, row.end_ms) for row in ROWS
    ]
    assert [row.probabilities is None for row in rows] == [False, False, True, False]
    for row, original in zip(rows, ROWS, strict=True):
        if row.probabilities is not None and original.probabilities is not None:
            assert np.array_equal(np.asarray(row.probabilities, np.float32), np.asarray(original.probabilities, np.float32))
    assert [file.name for file in path.parent.iterdir()] == ["predictions-val.csv"]


def test_the_file_is_plain_csv_with_class_names(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(path, ROWS, NAMES)
    with open(path, newline="", encoding="utf-8") as file:
        first, second, unreadable, unknown = csv.DictReader(file)
    assert list(first) == ["key", "split", "label", "prediction", "p_nongesture", "p_gesture", "source", "begin_ms", "end_ms"]
    assert list(first.values()) == ["val/gesture/000000012_x", "val", "gesture", "gesture", "0.25", "0.75", "x", "15600", "16900.5"]
    assert (second["label"], second["prediction"], second["begin_ms"]) == ("nongesture", "gesture", "")
    assert (unreadable["label"], unreadable["prediction"], unreadable["p_gesture"]) == ("gesture", "", "")
    assert (unknown["label"], unknown["prediction"]) == ("", "nongesture")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(path, ROWS, NAMES)
    before = path.read_bytes()
    with pytest.raises(IndexError):
        write_predictions(path, [Prediction("a", "val", 7, None)], NAMES)
    assert path.read_bytes() == before
