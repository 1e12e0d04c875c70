"""The threshold of the highest F1 against sklearn at every threshold, and where it is kept."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from clips.errors import InputError
from training.metrics import Judged
from training.threshold import Threshold, at_threshold, best_threshold, read_threshold, write_threshold

NAMES = ("nongesture", "gesture")


def judged(labels: list[int], scores: list[float], positive: str | None = None) -> Judged:
    high = np.asarray(scores, np.float64)
    return Judged(np.asarray(labels, np.int64), np.stack([1 - high, high], axis=1), [""] * len(labels), NAMES, positive)


def value(labels: list[int], scores: list[float]) -> float:
    found = best_threshold(judged(labels, scores))
    assert found is not None
    return found.value


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=1, max_size=30).filter(lambda rows: any(label for label, _ in rows)))
def test_it_is_the_middle_of_the_best_stretch_that_lies_nearest_to_a_half(rows: list[tuple[int, int]]) -> None:
    # scores are eighths, so F1 is constant over each ((k - 1) / 8, k / 8] and at 0
    f1 = [Fraction(2 * sum(label for label, score in rows if score >= k), sum(label + (score >= k) for label, score in rows)) for k in range(9)]
    stretches: list[list[int]] = []
    for k in range(9):
        if f1[k] == max(f1):
            if stretches and stretches[-1][1] == k - 1:
                stretches[-1][1] = k
            else:
                stretches.append([k, k])
    middles = [(max(0, first - 1) + last) / 16 for first, last in stretches]
    found = best_threshold(judged([label for label, _ in rows], [score / 8 for _, score in rows]))
    assert found is not None and found.f1 == pytest.approx(float(max(f1)))
    assert found.value in middles and abs(found.value - 0.5) == min(abs(middle - 0.5) for middle in middles)


def test_cases_by_hand() -> None:
    assert value([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.8]) == pytest.approx(0.4)  # all thresholds in (.2, .6] are right
    assert value([1, 1], [0.6, 0.8]) == pytest.approx(0.3)  # (0, .6]
    assert value([0, 1], [0.8, 0.6]) == pytest.approx(0.3)  # taking both is best
    assert value([1], [0.0]) == 0.0
    # (.8, .9] takes 1 of 2 and nothing wrong, F1 2/3; (0, .1] takes both and 2 wrong, F1 4/6: the middle .85 is nearer to .5 than .05
    assert value([1, 0, 0, 1], [0.9, 0.8, 0.5, 0.1]) == pytest.approx(0.85)


def test_a_threshold_takes_what_it_took_on_val_however_near_the_scores_lie() -> None:
    low = np.float32(0.7)
    high = np.nextafter(low, np.float32(1))
    threshold = value([0, 1], [float(low), float(high)])
    assert low < threshold <= high
    wide = float(np.nextafter(0.7, 1))
    assert value([0, 1], [0.7, wide]) == wide  # nothing lies between


def test_the_positive_class_may_be_the_first() -> None:
    found = best_threshold(judged([0, 0, 1], [0.1, 0.3, 0.8], "nongesture"), epoch=3)
    assert found is not None and found.value == pytest.approx((0.7 + 0.2) / 2)
    assert (found.positive, found.f1, found.epoch) == ("nongesture", 1.0, 3)


def test_without_two_classes_a_positive_clip_or_finite_numbers_there_is_none() -> None:
    three = Judged(np.array([0, 1, 2]), np.eye(3), [""] * 3, ("a", "b", "c"))
    assert best_threshold(three) is None
    assert best_threshold(judged([0, 0], [0.2, 0.4])) is None
    assert best_threshold(judged([0, 1], [0.2, float("nan")])) is None
    assert best_threshold(judged([], [])) is None


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=1, max_size=30), st.integers(0, 8))
def test_metrics_at_a_threshold_are_sklearns(rows: list[tuple[int, int]], eighths: int) -> None:
    labels, scores = [label for label, _ in rows], np.asarray([score / 8 for _, score in rows])
    taken = scores >= eighths / 8
    found = at_threshold(judged(labels, scores.tolist()), eighths / 8)
    assert found["threshold"] == eighths / 8 and found["accuracy_at_threshold"] == pytest.approx(accuracy_score(labels, taken))
    assert found["f1_at_threshold"] == (pytest.approx(f1_score(labels, taken, zero_division=0)) if any(labels) else None)
    assert found["recall_at_threshold"] == (pytest.approx(recall_score(labels, taken)) if any(labels) else None)
    assert found["precision_at_threshold"] == (pytest.approx(precision_score(labels, taken, zero_division=0)) if taken.any() else None)


def test_a_threshold_comes_back_as_it_was_written_and_none_removes_it(tmp_path: Path) -> None:
    assert read_threshold(tmp_path) is None
    write_threshold(tmp_path, Threshold(0.1 + 0.2, "gesture", 0.75, 4))
    assert read_threshold(tmp_path, "gesture") == Threshold(0.1 + 0.2, "gesture", 0.75, 4)
    assert json.loads((tmp_path / "threshold.json").read_text())["epoch"] == 4
    with pytest.raises(InputError, match=r"threshold\.json: is of class gesture; the run's positive class is nongesture"):
        read_threshold(tmp_path, "nongesture")
    write_threshold(tmp_path, None)
    assert read_threshold(tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"value": "x", "positive": "gesture", "f1": 1}', '{"value": null, "positive": "g", "f1": 1}'])
def test_a_damaged_threshold_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "threshold.json").write_text(text)
    with pytest.raises(InputError, match=r"threshold\.json: expected a threshold"):
        read_threshold(tmp_path)
