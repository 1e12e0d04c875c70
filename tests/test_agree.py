"""Agreement of predictions against scipy, sklearn and counting, and files of other scripts against ours."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score, roc_auc_score

from clips import command
from clips.errors import InputError
from training import __main__
from training.agree import Agreement, agreement, in_words, mcnemar
from training.bootstrap import resampled
from training.foreign import class_names_of, matched, read_any
from training.metrics import Prediction, write_predictions

NAMES = ("nongesture", "gesture")


def drawn(num_clips: int, seed: int, num_sources: int = 12) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, labels and probabilities of gesture that tell in part."""
    chance = np.random.RandomState(seed)
    labels = np.random.RandomState(0).randint(0, 2, num_clips)
    keys = [f"test/{NAMES[label]}/{number:09d}_video_{number % num_sources}" for number, label in enumerate(labels)]
    return keys, labels, np.clip(0.5 + 0.25 * (labels - 0.5) + chance.normal(0, 0.2, num_clips), 0, 1).astype(np.float32).astype(float)


def write_ours(path: Path, keys: Sequence[str], labels: Sequence[int | None], scores: Sequence[float | None], names: tuple[str, str] = NAMES) -> Path:
    rows = [
        Prediction(key, "test", label, None if score is None else [1 - score, score], key.split("_", 1)[1])
        for key, label, score in zip(keys, labels, scores, strict=True)
    ]
    write_predictions(path, rows, names)
    return path


def write_table(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header, *lines])
    return path


def compared(first: Path, second: Path, class_order: Sequence[str] = ()) -> Agreement:
    return agreement((first, read_any(first, NAMES, class_order)), (second, read_any(second, NAMES, class_order)), NAMES, None)


def typed(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["training", *map(str, words)])
    return command.run(__main__.main)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (0, 6), (5, 5), (5, 6), (3, 12), (40, 71), (900, 1010)])
def test_mcnemars_p_is_scipys_exact_binomial_test(one: int, other: int) -> None:
    expected = scipy.stats.binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
    assert mcnemar(one, other) == pytest.approx(expected, rel=1e-9)


def test_two_predictions_are_counted_as_by_hand_and_by_sklearn(tmp_path: Path) -> None:
    keys, labels, first = drawn(300, 1)
    second = drawn(300, 2)[2]
    found = compared(
        write_ours(tmp_path / "a.csv", keys, labels.tolist(), first.tolist()), write_ours(tmp_path / "b.csv", keys, labels.tolist(), second.tolist())
    )
    right = (first > 0.5) == labels, (second > 0.5) == labels
    assert (found.clips, found.judged, found.only_first, found.only_second, found.unread) == (300, 300, 0, 0, 0)
    assert found.flips == sum((first > 0.5) != (second > 0.5)) > 50
    assert found.mean_change == pytest.approx(np.abs(first - second).mean(), abs=1e-7)
    assert found.largest_change == pytest.approx(np.abs(first - second).max(), abs=1e-7)
    assert (found.only_first_right, found.only_second_right) == (sum(right[0] & ~right[1]), sum(right[1] & ~right[0]))
    assert found.mcnemar_p == pytest.approx(scipy.stats.binomtest(found.only_first_right, found.only_first_right + found.only_second_right).pvalue)
    assert found.values["auroc"] == pytest.approx((roc_auc_score(labels, first), roc_auc_score(labels, second)))
    assert found.deltas["f1"] == pytest.approx(f1_score(labels, second > 0.5) - f1_score(labels, first > 0.5))


def test_intervals_of_differences_come_from_the_same_resamples_of_sources_for_both(tmp_path: Path) -> None:
    keys, labels, first = drawn(120, 1)
    second = np.clip(first + 0.02 * np.random.RandomState(5).normal(size=120), 0, 1).astype(np.float32).astype(float)
    found = compared(
        write_ours(tmp_path / "a.csv", keys, labels.tolist(), first.tolist()), write_ours(tmp_path / "b.csv", keys, labels.tolist(), second.tolist())
    )
    deltas = []
    for weights in np.concatenate(list(resampled([key.split("_", 1)[1] for key in keys])))[:200]:
        one, other = (roc_auc_score(labels, scores, sample_weight=weights) for scores in (first, second))
        deltas.append(other - one)
    ends = found.intervals["auroc"]
    assert ends is not None and ends == pytest.approx(tuple(np.quantile(deltas, [0.025, 0.975])), abs=0.003)
    assert ends[1] - ends[0] < 0.06  # unpaired, from other resamples for each, they would be several times as wide


def test_a_file_agrees_with_itself(tmp_path: Path) -> None:
    keys, labels, scores = drawn(60, 1)
    path = write_ours(tmp_path / "a.csv", keys, labels.tolist(), scores.tolist())
    found = compared(path, path)
    assert (found.flips, found.mean_change, found.mcnemar_p, found.deltas["auroc"], found.intervals["f1"]) == (0, 0.0, 1.0, 0.0, (0.0, 0.0))
    assert in_words(found).splitlines() == [
        f"{path} against {path}: 60 clips",
        "  flips: 0 (0.00%), mean |Δp| 0, largest 0",
        "  right in one alone: 0 and 0, McNemar's p 1",
        f"  Δauroc +0.0000 [+0.0000 to +0.0000]: {found.values['auroc'][0]:.4f} -> {found.values['auroc'][0]:.4f}",
        f"  Δf1 +0.0000 [+0.0000 to +0.0000]: {found.values['f1'][0]:.4f} -> {found.values['f1'][0]:.4f}",
        "  (intervals over 12 sources)",
    ]


def test_clips_of_one_file_alone_unread_and_without_label_are_left_out_and_counted(tmp_path: Path) -> None:
    keys, labels, scores = drawn(40, 1)
    known: list[int | None] = [None, *labels.tolist()[1:]]
    first = write_ours(tmp_path / "a.csv", keys[:38], known[:38], scores.tolist()[:38])
    second = write_ours(tmp_path / "b.csv", [*keys[3:], keys[0]], [*known[3:], None], [None, *scores.tolist()[4:], scores[0]])
    found = compared(first, second)
    assert (found.clips, found.only_first, found.only_second, found.unread, found.judged) == (35, 2, 2, 1, 34)
    assert "(left out: 2 only in the first, 2 only in the second, 1 without probabilities)" in in_words(found)
    assert "1 clips have no label and are not judged." in found.notes


def test_a_label_in_one_file_is_enough_and_without_any_only_changes_are_told(tmp_path: Path) -> None:
    keys, labels, scores = drawn(40, 1)
    unlabelled = write_ours(tmp_path / "a.csv", keys, [None] * 40, scores.tolist())
    labelled = write_ours(tmp_path / "b.csv", keys, labels.tolist(), scores.tolist())
    assert compared(unlabelled, labelled).judged == 40
    found = compared(unlabelled, unlabelled)
    assert (found.judged, found.clips, found.deltas) == (0, 40, {}) and "McNemar" not in in_words(found)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize(
    ("header", "line"),
    [
        (["path", "label", "p_0", "p_1"], lambda key, label, p: [f"/data/home/{key}.npz", 1 - label, p, 1 - p]),
        (["file", "target", "prob_1", "prob_0"], lambda key, label, p: [f"{key}.npz", f"{1 - label}.0", 1 - p, p]),
        (["filename", "label", "gesture", "nongesture"], lambda key, label, p: [key.split("/")[-1], NAMES[label], p, 1 - p]),
        (["Video", "Label", "Probability"], lambda key, label, p: [key, 1 - label, 1 - p]),
        (["clip", "0", "1"], lambda key, label, p: ["\\".join(["C:", *key.split("/")]), p, 1 - p]),
    ],
)
def test_another_scripts_table_in_another_class_order_is_read_as_ours(tmp_path: Path, header: list[str], line: Any, delimiter: str) -> None:
    keys, labels, scores = drawn(50, 1)
    ours = write_ours(tmp_path / "ours.csv", keys, labels.tolist(), scores.tolist())
    lines = [line(key, label, p) for key, label, p in zip(keys, labels.tolist(), scores.tolist(), strict=True)]
    theirs = write_table(tmp_path / "theirs.csv", header, lines[::-1], delimiter)
    found = compared(ours, theirs, ("gesture", "nongesture"))
    assert (found.clips, found.judged, found.flips, found.only_first_right) == (50, 50, 0, 0)
    assert found.largest_change < 1e-6


def test_labels_in_another_order_are_an_error_that_names_the_flag(tmp_path: Path) -> None:
    keys, labels, scores = drawn(50, 1)
    ours = write_ours(tmp_path / "ours.csv", keys, labels.tolist(), scores.tolist())
    theirs = write_table(tmp_path / "theirs.csv", ["key", "label", "prob"], [[key, 1 - label, 0.5] for key, label in zip(keys, labels, strict=True)])
    with pytest.raises(InputError, match=r"theirs\.csv: 50 of 50 clips have another label .*--class-order gesture nongesture"):
        compared(ours, theirs)


def test_a_single_probability_is_of_the_last_class_in_order(tmp_path: Path) -> None:
    path = write_table(tmp_path / "one.csv", ["key", "score"], [["a", 0.25]])
    assert read_any(path, NAMES, ())[0].probabilities == [0.75, 0.25]
    assert read_any(path, NAMES, ("gesture", "nongesture"))[0].probabilities == [0.25, 0.75]
    named = write_table(tmp_path / "named.csv", ["key", "p_gesture"], [["a", 0.25]])
    assert read_any(named, NAMES, ())[0].probabilities == [0.75, 0.25]


def test_our_files_class_order_wins_over_another_files_columns(tmp_path: Path) -> None:
    theirs = write_table(tmp_path / "theirs.csv", ["key", "p_gesture", "p_nongesture"], [])
    ours = write_ours(tmp_path / "ours.csv", [], [], [])
    numbered = write_table(tmp_path / "numbered.csv", ["key", "p_0", "p_1"], [])
    assert class_names_of([theirs, ours]) == class_names_of([numbered, ours]) == NAMES
    assert class_names_of([numbered, theirs]) == ("gesture", "nongesture") and class_names_of([numbered]) == ()


def test_keys_are_matched_by_their_ends_only_where_these_are_unique() -> None:
    ours = ["test/a/1_x", "test/b/1_x", "test/b/2_y_z"]
    assert matched(ours, ["test/b/1_x", "test/a/1_x"]) == [(0, 1), (1, 0)]
    assert matched(ours, ["/d/test/b/2_y.z.npz", "/d/test/a/1_x.npz"]) == [(0, 1), (2, 0)]
    assert matched(ours, ["b/1_x.npz"]) == [(1, 0)]
    assert matched(ours, ["1_x.npz"]) == []  # which of the two?
    assert matched(ours[1:], ["1_x.npz", "3_x.npz"]) == [(0, 0)]
    assert matched(["test/a/1_x", "val/a/1_x"], ["/d/val/a/1_x.npz"]) == [(1, 0)]
    assert matched(["a", "b"], ["c"]) == []


def test_three_classes_agree_by_half_the_sum_of_changes(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    rows = [Prediction(f"{number:09d}_s{number}", "test", number % 3, [0.5, 0.3, 0.2], f"s{number}") for number in range(9)]
    write_predictions(tmp_path / "a.csv", rows, names)
    write_predictions(tmp_path / "b.csv", [Prediction(row.key, "test", row.label, [0.2, 0.3, 0.5], row.source) for row in rows], names)
    files = [(tmp_path / name, read_any(tmp_path / name, names, ())) for name in ("a.csv", "b.csv")]
    found = agreement(files[0], files[1], names, None)
    assert (found.flips, found.only_first_right, found.only_second_right) == (9, 3, 3)
    assert found.mean_change == pytest.approx(0.3) == pytest.approx(found.largest_change)
    assert found.deltas == {"auroc": pytest.approx(0), "f1": pytest.approx(0)}


def test_clips_of_unknown_source_stand_for_themselves_and_it_is_said(tmp_path: Path) -> None:
    lines = [[f"clip{number}", number % 2, number / 10] for number in range(8)]
    path = write_table(tmp_path / "a.csv", ["key", "label", "p"], lines)
    assert "the source of 8 clips is unknown: each counts as a source of its own, so intervals may be too narrow." in compared(path, path).notes


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ([], [], "no column names the clips"),
        (["key", "x"], [], "no probabilities; expected columns p_nongesture, p_gesture, or of two classes one of probability"),
        (["key", "p_0", "p_1"], [], "say with --class-order"),
        (["key", "p"], [["a", "1.5"]], "line 2: probabilities 1.5; expected 0 … 1"),
        (["key", "p"], [["a", "much"]], "line 2: probabilities much; expected 0 … 1"),
        (["key", "p_gesture", "p_nongesture"], [["a", "0.5", "0.4"]], "add up to 0.900; expected 1"),
        (["key", "p"], [["a", "1"], ["a", "1"]], "clip 'a' comes twice"),
        (["key", "label", "p"], [["a", "gestur", "1"]], "class 'gestur'; expected one of nongesture, gesture, or its number. Did you mean gesture?"),
        (["key", "label", "p"], [["a", "2", "1"]], "class '2'; expected one of nongesture, gesture"),
        (["key", "p"], [["a", "1", "2"]], "line 2: 3 cells; expected 2"),
        (["key", "p", "p"], [], "a column's name comes twice"),
    ],
)
def test_another_table_is_one_line_that_names_the_place(tmp_path: Path, header: list[str], lines: list[list[str]], message: str) -> None:
    path = write_table(tmp_path / "other.csv", header, lines)
    with pytest.raises(InputError) as caught:
        read_any(path, NAMES, ())
    assert "other.csv" in str(caught.value) and message in str(caught.value)


def test_several_files_are_each_compared_with_the_first_and_written_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    keys, labels, scores = drawn(40, 1)
    paths = [
        write_ours(tmp_path / f"{name}.csv", keys, labels.tolist(), np.clip(scores + add, 0, 1).tolist()) for name, add in (("a", 0), ("b", 0.1), ("c", 0.2))
    ]
    assert typed(monkeypatch, "agree", *paths, "--json", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["second"] for one in found] == [str(path) for path in paths[1:]] and {one["first"] for one in found} == {str(paths[0])}
    assert found[0]["mean_change"] < found[1]["mean_change"] and found[0]["deltas"]["auroc"] is not None
    assert capsys.readouterr().out.count("McNemar's p") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agree", "a.csv"], "agree: one file given"),
        (["agree", "a.csv", "none.csv"], "none.csv: cannot be read as a table"),
        (["agree", "a.csv", "a.csv", "--class-order", "gesture", "other"], "--class-order gesture other: expected nongesture, gesture"),
        (["agree", "a.csv", "a.csv", "--positive", "gestur"], "Did you mean gesture?"),
        (["agree", "numbers.csv", "numbers.csv"], "no file names its classes"),
        (["agree", "a.csv", "far.csv"], "no clip that both name"),
    ],
)
def test_wrong_words_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    keys, labels, scores = drawn(5, 1)
    write_ours(Path("a.csv"), keys, labels.tolist(), scores.tolist())
    write_table(Path("far.csv"), ["key", "p"], [["elsewhere", 0.5]])
    write_table(Path("numbers.csv"), ["key", "p_0", "p_1"], [["a", 0.5, 0.5]])
    assert typed(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err
