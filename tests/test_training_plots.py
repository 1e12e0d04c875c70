"""Pictures of a split and of runs: their lines against sklearn and numpy, their files as PNG, a report's table of sources."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, confusion_matrix, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tests.reading import read_predictions
from training.metrics import Judged, Prediction, evaluate
from training.plots import calibration, draw_all, pictures_of, show_pictures, write_pictures
from training.report import detailed, report, write_report
from training.threshold import Threshold, at_threshold, write_threshold

TWO, THREE = ("nongesture", "gesture"), ("beat", "iconic", "none")
ALL = {"roc", "pr", "calibration", "confusion"}


def judged(class_names: tuple[str, ...] = TWO, num_clips: int = 120, positive: str | None = None) -> Judged:
    """Labels that the probabilities tell in part, six sources."""
    chance = np.random.RandomState(len(class_names))
    labels = chance.randint(0, len(class_names), num_clips)
    scores = chance.uniform(size=(num_clips, len(class_names))) + 0.6 * np.eye(len(class_names))[labels]
    scores /= scores.sum(axis=1, keepdims=True)
    return Judged(labels, scores, [f"s{number % 6}" for number in range(num_clips)], class_names, positive)


def line(figure: Figure, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    drawn = figure.axes[0].lines[number]
    return np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())


def texts(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("positive", [None, "nongesture"])
def test_the_areas_under_the_drawn_lines_are_the_metrics(positive: str | None) -> None:
    one = judged(positive=positive)
    index = 1 if positive is None else 0
    figures, metrics = draw_all(one, "val"), evaluate(one.labels, one.probabilities, TWO, positive)
    wrong, found = line(figures["roc"])
    assert auc(wrong, found) == pytest.approx(metrics["auroc"]) == pytest.approx(roc_auc_score(one.labels == index, one.probabilities[:, index]))
    recall, precision = line(figures["pr"])
    assert figures["pr"].axes[0].lines[0].get_drawstyle() == "steps-post"  # then the area under the steps is the average precision
    assert -np.sum(np.diff(recall) * precision[:-1]) == pytest.approx(metrics["average_precision"])
    assert texts(figures["roc"]) == [f"{TWO[index]}, area {metrics['auroc']:.3f}"]
    assert figures["roc"].axes[0].get_title() == "val, 120 clips"


def test_three_classes_are_drawn_each_against_the_rest() -> None:
    one = judged(THREE)
    figures = draw_all(one, "test")
    for index, name in enumerate(THREE):
        wrong, found = line(figures["roc"], index)
        assert auc(wrong, found) == pytest.approx(roc_auc_score(one.labels == index, one.probabilities[:, index]))
        assert texts(figures["roc"])[index].startswith(name)
    drawn = [text.get_text() for text in figures["confusion"].axes[0].texts]
    assert drawn == [str(count) for count in confusion_matrix(one.labels, one.predictions).ravel()]


def test_calibration_is_sklearns_and_counts_every_clip() -> None:
    one = judged()
    is_class, scores = one.labels == 1, one.probabilities[:, 1]
    mean, share, clips = calibration(is_class, scores)
    theirs = calibration_curve(is_class, scores, n_bins=10)
    np.testing.assert_allclose((share, mean), theirs)
    assert clips.sum() == 120
    np.testing.assert_allclose(line(draw_all(one, "")["calibration"]), (mean, share))
    assert calibration(np.array([True, False]), np.array([1.0, 0.95]))[2].tolist() == [2]  # both in the last tenth


def test_what_the_clips_do_not_allow_is_not_drawn() -> None:
    empty = Judged(np.zeros(0, np.int64), np.zeros((0, 2)), [], TWO)
    assert draw_all(empty, "") == {}
    assert draw_all(Judged(np.array([0]), np.array([[np.nan, np.nan]]), ["s"], TWO), "") == {}
    of_one_kind = draw_all(Judged(np.array([0, 0]), np.array([[0.5, 0.5], [1, 0]]), ["s", "s"], TWO), "")
    assert set(of_one_kind) == ALL and texts(of_one_kind["roc"]) == []


def test_pictures_are_png_files_of_the_same_bytes_each_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_pictures(tmp_path / folder, "val", pictures_of(judged(), "val"))
    assert {path.name for path in (tmp_path / "one").iterdir()} == {f"val-{name}.png" for name in ALL}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        with Image.open(path) as picture:
            assert picture.size == (500, 460)


def test_tensorboard_holds_the_pixels_of_the_pictures(tmp_path: Path) -> None:
    pictures = pictures_of(judged(), "test")
    board = SummaryWriter(str(tmp_path))
    show_pictures(board, "test", pictures, 17)
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Images("test/confusion")
    assert event.step == 17
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), pictures["confusion"])


def test_a_report_has_a_table_of_sources_and_all_pictures(tmp_path: Path) -> None:
    one = judged()
    assert set(write_report(tmp_path, "test", one, "a run")) == ALL
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"test-{name}.png" for name in ALL}
    with (tmp_path / "sources-test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == [f"s{number}" for number in range(6)]
    for number, row in enumerate(rows):
        mine = slice(number, None, 6)
        labels, scores = one.labels[mine], one.probabilities[mine]
        assert row == {
            "source": f"s{number}",
            "clips": "20",
            "accuracy": f"{np.mean(labels == (scores[:, 1] > 0.5)):.4f}",
            "clips_gesture": str(sum(labels)),
            "predicted_gesture": str(sum(scores[:, 1] > 0.5)),
            "mean_p_gesture": f"{np.mean(scores[:, 1]):.4f}",
        }


def test_a_table_of_sources_has_three_columns_for_each_of_three_classes(tmp_path: Path) -> None:
    write_report(tmp_path, "val", judged(THREE, 30), "a run")
    header, first = (tmp_path / "sources-val.csv").read_text().splitlines()[:2]
    assert header.split(",") == ["source", "clips", "accuracy", *(f"{what}_{name}" for name in THREE for what in ("clips", "predicted", "mean_p"))]
    cells = dict(zip(header.split(","), first.split(","), strict=True))
    assert sum(int(cells[f"clips_{name}"]) for name in THREE) == sum(int(cells[f"predicted_{name}"]) for name in THREE) == int(cells["clips"])
    assert sum(float(cells[f"mean_p_{name}"]) for name in THREE) == pytest.approx(1, abs=2e-4)


def test_a_report_is_logged_written_shown_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Folder:
        path: Path
        lines: list[Mapping[str, Any]]
        shown: list[tuple[str, set[str], int]]

        def log(self, record: Mapping[str, Any]) -> None:
            self.lines.append(record)

        def show(self, split: str, pictures: Mapping[str, np.ndarray], step: int) -> None:
            self.shown.append((split, set(pictures), step))

    one, folder = judged(), Folder(tmp_path, [], [])
    caplog.set_level("INFO")
    write_threshold(tmp_path, Threshold(0.4, "gesture", 0.9))
    rows = [Prediction(f"k{n}", "test", int(label), row.tolist()) for n, (label, row) in enumerate(zip(one.labels, one.probabilities, strict=True))]
    report(folder, "test", 30, 3, one, evaluate(one.labels, one.probabilities, TWO), rows)
    (line,) = folder.lines
    expected = detailed(evaluate(one.labels, one.probabilities, TWO), one, Threshold(0.4, "gesture", 0.9))
    assert line == {"step": 30, "epoch": 3, **{f"test/{name}": value for name, value in expected.items() if name != "notes"}}
    assert folder.shown == [("test", ALL, 30)] and len(read_predictions(tmp_path / "predictions-test.csv")[0]) == 120
    assert (tmp_path / "sources-test.csv").exists() and "test, best epoch: loss" in caplog.text and "at val's threshold 0.4000" in caplog.text


def test_details_are_the_metrics_with_intervals_and_those_at_vals_threshold() -> None:
    one = judged()
    metrics = evaluate(one.labels, one.probabilities, TWO)
    found = detailed(metrics, one, Threshold(0.4, "gesture", 0.9))
    assert {name: found[name] for name in metrics if name != "notes"} == {name: value for name, value in metrics.items() if name != "notes"}
    assert found["f1_at_threshold"] == at_threshold(one, 0.4)["f1_at_threshold"] and found["threshold"] == 0.4
    assert found["intervals"]["auroc"][0] < found["auroc"] < found["intervals"]["auroc"][1]
    assert "f1_at_threshold" in found["intervals"]
    few = Judged(one.labels, one.probabilities, ["one"] * 120, TWO)
    assert detailed({**metrics, "notes": ["before."]}, few, None)["notes"] == ["before.", "no intervals: 1 source, expected at least 5"]
    without = detailed(metrics, one, None)
    assert "threshold" not in without and "f1_at_threshold" not in without["intervals"]


def test_a_diverged_model_and_a_split_without_clips_have_no_details() -> None:
    diverged = Judged(np.array([0, 1]), np.full((2, 2), np.nan), ["a", "b"], TWO)
    for one in (diverged, Judged(np.zeros(0, np.int64), np.zeros((0, 2)), [], TWO)):
        metrics = evaluate(one.labels, one.probabilities, TWO)
        assert detailed(metrics, one, Threshold(0.4, "gesture", 0.9)) == {**metrics, "intervals": {}}
