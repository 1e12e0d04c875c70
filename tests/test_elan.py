"""Annotations for ELAN against cases by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clips.errors import InputError
from clips.format import ClipFacts
from convert.pack import PackConfig, pack
from tests.making import write_home
from tests.packing import snippets_of, use_threads
from training.elan import Annotation, Decision, Windows, annotations_of, windows_in, windows_of, with_times, write_elan
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
    found = [(one.begin_ms, one.end_ms) for one in with_times(facts, windows_of(facts), 100)]
    assert found == [(100, 200), (0, 100), (None, None), (None, None), (None, None), (70, 77), (None, None), (None, None)]


# --- sources in several splits


def named(home: Path, *names: str) -> Path:
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    return home


def begins(windows: Windows, split: str, clip_ms: int | None = None) -> dict[str, int | None]:
    """Each snippet's begin in ms by source and number, from facts as a split alone tells them: counted from its first snippet there."""
    facts = []
    for source, splits in windows.numbers.items():
        known = sorted(number for number in splits.get(split, ()) if number is not None)
        for number in splits.get(split, ()):
            is_gapless = number is not None and known == list(range(known[0], known[0] + len(known)))
            begin_ms = (number - known[0]) * 1300 if is_gapless and number is not None else None
            facts.append(ClipFacts(f"{source}{number}", 0, source, number, begin_ms, None if begin_ms is None else begin_ms + 1300, 5))
    return {fact.key: fact.begin_ms for fact in with_times(facts, windows, clip_ms)}


def test_times_of_a_source_in_several_splits_count_from_its_first_snippet_in_any(tmp_path: Path) -> None:
    home = named(
        tmp_path / "show_length_1300_sample_rate_1_iou_0.5",
        *("train/a/000000004_block.npz", "train/b/000000005_block.npz", "test/a/000000006_block.npz", "test/a/000000007_block.npz"),
        *("train/a/000000000_mixed.npz", "val/a/000000001_mixed.npz", "test/b/000000002_mixed.npz", "train/b/000000003_mixed.npz"),
        "test/a/000000004_mixed.npz",
        *("test/a/000000008_own.npz", "test/a/000000009_own.npz"),
    )
    expected = {"block6": 2600, "block7": 3900, "mixed2": 2600, "mixed4": 5200, "own8": 0, "own9": 1300}
    assert begins(windows_in(home), "test") == expected


def test_times_of_a_source_whose_numbers_lack_some_or_repeat_over_its_splits_are_unknown(tmp_path: Path) -> None:
    home = named(
        tmp_path / "show_length_1300_sample_rate_1_iou_0.5",
        *("train/a/000000000_gap.npz", "test/a/000000002_gap.npz", "test/a/000000003_gap.npz"),
        *("train/a/000000000_again.npz", "train/a/000000001_again.npz", "test/b/000000000_again.npz"),
    )
    assert begins(windows_in(home), "test") == {"gap2": None, "gap3": None, "again0": None}


def test_a_homes_name_without_a_length_leaves_scattered_snippets_to_clip_ms(tmp_path: Path) -> None:
    home = named(tmp_path, "train/a/000000001_x.npz", "test/a/000000000_x.npz", "test/a/000000002_x.npz")
    assert begins(windows_in(home), "test") == {"x0": None, "x2": None}
    assert begins(windows_in(home), "test", 500) == {"x0": 0, "x2": 1000}


def test_shards_tell_the_same_windows_as_their_snippets_also_those_that_were_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 3}, "test": {"a": 2, "b": 2}}, frames=2, height=16, width=16)
    bad = snippets_of(home / "train")[1]
    bad.write_bytes(b"no npz")
    pack(PackConfig(home, tmp_path / "shards", max_bad_clips=1, workers=1))
    ours, theirs = windows_in(tmp_path / "shards"), windows_in(home)
    assert ours.length_ms == theirs.length_ms == 1300
    sort = [{source: {split: sorted(map(str, found)) for split, found in splits.items()} for source, splits in one.numbers.items()} for one in (ours, theirs)]
    assert sort[0] == sort[1] and sum(len(found) for splits in ours.numbers.values() for found in splits.values()) == 7
