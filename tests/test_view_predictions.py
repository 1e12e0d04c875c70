"""view --predictions: a run's errors, those first of which it was most certain, and no other file in their place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from clips.errors import InputError
from clips.manifest import read_index, read_manifest
from convert.view import ViewConfig, view
from tests.viewing import GESTURES, NONGESTURES, Page, keys, shown, write_shards
from training.metrics import Prediction, write_predictions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("predicted"))


Predict = Callable[..., Path]


@pytest.fixture
def predict(folder: Path, tmp_path: Path) -> Predict:
    """A predictions file in which the clips of `wrong` (key: p of the label) are errors; all others are right with 0.9."""

    def write(wrong: dict[str, float], split: str = "train", without: Sequence[str] = (), unread: Sequence[str] = ()) -> Path:
        manifest = read_manifest(folder / "shards")
        rows = []
        for shard in manifest.splits[split].shards:
            for entry in read_index(folder / "shards", split, shard).clips:
                facts = entry.facts
                right = wrong.get(facts.key, 0.9)
                scores = None if facts.key in unread else [right, 1 - right] if facts.label == 0 else [1 - right, right]
                label = None if facts.key in without else facts.label
                rows.append(Prediction(facts.key, split, label, scores, facts.source, facts.begin_ms, facts.end_ms))
        write_predictions(tmp_path / f"predictions-{split}.csv", rows, manifest.classes)
        return tmp_path / f"predictions-{split}.csv"

    return write


def test_errors_come_most_certain_first(folder: Path, tmp_path: Path, predict: Predict) -> None:
    wrong = {GESTURES[2]: 0.25, NONGESTURES[4]: 0.015625, GESTURES[0]: 0.125, NONGESTURES[1]: 0.125}
    path = predict(wrong)
    page = shown(folder, tmp_path / "a.html", predictions=path, clips=1)
    assert keys(page) == [NONGESTURES[4], GESTURES[0], NONGESTURES[1], GESTURES[2]]
    heads = [" ".join(article.split()).split(" train/")[0] for article in page.articles]
    assert heads[0] == "nongesture predicted gesture 0.984"
    assert heads[1:] == ["gesture predicted nongesture 0.875", "nongesture predicted gesture 0.875", "gesture predicted nongesture 0.750"]
    assert page.title.endswith("all 4 errors among 10 predictions in predictions-train.csv, the most certain first")
    two = shown(folder, tmp_path / "a.html", predictions=path, worst=2)
    assert keys(two) == [NONGESTURES[4], GESTURES[0]]
    assert two.title.endswith("the 2 most certain of 4 errors among 10 predictions in predictions-train.csv")
    assert keys(shown(folder, tmp_path / "a.html", predictions=path, label="gesture")) == [GESTURES[0], GESTURES[2]]
    assert view(ViewConfig(folder / "shards", tmp_path / "a.png", predictions=path)) == 0


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_a_run_without_errors_is_said_to_have_none(folder: Path, tmp_path: Path, predict: Predict, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    assert view(ViewConfig(folder / "shards", tmp_path / f"a.{suffix}", predictions=predict({}))) == 0
    assert "no errors: all 10 predictions in predictions-train.csv are right" in capsys.readouterr().out
    if suffix == "html":
        page = Page(tmp_path / "a.html")
        assert "no errors: all 10 predictions" in page.title and page.articles == []
    else:
        with Image.open(tmp_path / "a.png") as image:
            assert image.size[1] == 2 * 32 + 92


def test_clips_without_label_or_prediction_are_left_out_and_counted(folder: Path, tmp_path: Path, predict: Predict, caplog: pytest.LogCaptureFixture) -> None:
    path = predict({GESTURES[0]: 0.1, GESTURES[1]: 0.2}, without=[GESTURES[0]], unread=[NONGESTURES[0]])
    with caplog.at_level(logging.INFO):
        page = shown(folder, tmp_path / "a.html", predictions=path)
    assert keys(page) == [GESTURES[1]] and "1 errors among 8 predictions" in page.title
    assert "2 clips have no label or no prediction" in caplog.text


def test_predictions_of_other_clips_are_an_error(folder: Path, tmp_path: Path, predict: Predict) -> None:
    path = predict({GESTURES[0]: 0.1})
    good = path.read_text()
    for old, new, said in [
        (GESTURES[0], "train/gesture/unknown", "clip 'train/gesture/unknown' is not in"),
        (f"{GESTURES[0]},train,gesture,nongesture", f"{GESTURES[0]},train,nongesture,gesture", "is nongesture there and gesture in"),
        ("p_gesture", "p_wave", "expected the columns key,split,label,prediction,p_nongesture,p_gesture,source,begin_ms,end_ms; found key"),
        ("key,split", "clip,split", "found clip,split"),
        (",train,gesture,nongesture", ",train,gesture,nongestur", "prediction 'nongestur'; expected one of nongesture, gesture. Did you mean"),
        (",gesture,nongesture,0.9,0.1,", ",gesture,nongesture,nan,nan,", "probability 'nan'; expected 0 … 1"),
        (",train_gesture_001,0,", ",", "7 cells; expected 9"),
        (good, "", "found an empty file"),
    ]:
        assert old in good
        path.write_text(good.replace(old, new))
        with pytest.raises(InputError) as caught:
            view(ViewConfig(folder / "shards", tmp_path / "a.html", predictions=path))
        assert said in str(caught.value) and str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        view(ViewConfig(folder / "shards", tmp_path / "a.html", predictions=path))
    assert not (tmp_path / "a.html").exists()


def test_predictions_of_another_split_are_an_error(folder: Path, tmp_path: Path, predict: Predict) -> None:
    path = predict({GESTURES[0]: 0.1})
    with pytest.raises(InputError, match=r"no prediction of a labelled clip .* leave out --split"):
        view(ViewConfig(folder / "shards", tmp_path / "a.html", predictions=path, split="val"))
