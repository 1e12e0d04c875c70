"""Annotations for ELAN against cases by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clips.errors import InputError
from clips.format import ClipFacts
from training.elan import Annotation, Decision, annotations_of, with_times, write_elan
from training.metrics import Prediction

NAMES = ("nongesture", "gesture")
GESTURE = Decision(NAMES, 1, 0.5)


def rows(*clips: tuple[int | None, float | None]) -> list[Prediction]:
    """Clips of a second from their begin in s and probability of gesture."""
    return [
        Prediction(f"k{n}", "", None, None if p is None else [1 - p, p], "video", None if s is None else 1000 * s, None if s is None else 1000 * s + 1000)
        for n, (s, p) in enumerate(clips)
    ]


def test_neighbours_are_merged_and_gaps_negatives_and_unread_clips_separate() -> None:
    found = annotations_of(rows((5, 0.9), (0, 0.5), (1, 0.9), (2, 0.4), (3, 0.8), (6, None), (7, 0.7)), GESTURE)
    assert found == [Annotation(0, 2000, "gesture"), Annotation(3000, 4000, "gesture"), Annotation(5000, 6000, "gesture"), Annotation(7000, 8000, "gesture")]
    assert annotations_of(rows((0, 0.1)), GESTURE) == []


def test_overlapping_neighbours_are_merged_and_a_negative_between_them_separates() -> None:
    clips = [Prediction(str(n), "", None, [1 - p, p], "v", 500 * n, 500 * n + 1000) for n, p in enumerate([0.9, 0.8, 0.1, 0.7])]
    assert annotations_of(clips, GESTURE) == [Annotation(0, 1500, "gesture"), Annotation(1500, 2500, "gesture")]


def test_of_more_classes_each_clip_gets_its_most_probable_one() -> None:
    three = Decision(("a", "b", "c"), None, 0.5)
    clips = [Prediction(str(n), "", None, list(map(float, row)), "v", 10 * n, 10 * n + 10) for n, row in enumerate(np.eye(3)[[0, 0, 2, 0]])]
    assert annotations_of(clips, three) == [Annotation(0, 20, "a"), Annotation(20, 30, "c"), Annotation(30, 40, "a")]


def test_a_source_with_one_unknown_time_has_no_file_and_one_without_positives_an_empty_one(tmp_path: Path) -> None:
    known = [Prediction("a", "", None, [0.9, 0.1], "quiet", 0, 1000)]
    assert write_elan(tmp_path, [*rows((0, 0.9), (None, 0.9)), *known], GESTURE) == {"quiet": 0}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"quiet.txt": ""}


def test_a_source_whose_name_leaves_the_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no name for a file"):
        write_elan(tmp_path / "elan", [Prediction("a", "", None, [0.5, 0.5], "../video", 0, 1000)], GESTURE)


def test_times_follow_from_gapless_numbers_and_known_ones_stay() -> None:
    def fact(source: str, index: int | None, begin_ms: int | None = None) -> ClipFacts:
        return ClipFacts(f"{source}{index}", -1, source, index, begin_ms, None if begin_ms is None else begin_ms + 7, 5)

    facts = [fact("a", 13), fact("a", 12), fact("b", 1), fact("b", 3), fact("c", None), fact("d", 0, 70), fact("e", 2), fact("e", 2)]
    found = [(one.begin_ms, one.end_ms) for one in with_times(facts, 100)]
    assert found == [(100, 200), (0, 100), (None, None), (None, None), (None, None), (70, 77), (None, None), (None, None)]
