"""predict.py as a user runs it, on a run folder made without training: what it writes, how it goes on, what ELAN gets."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import predict
from clips import command
from clips.errors import InputError
from clips.format import ClipFacts
from convert.pack import PackConfig, pack
from loaders.stream import Loader
from loaders.views import Views
from models import ModelConfig, build_model
from tests.making import write_home
from tests.reading import read_predictions
from training.evaluation import scored
from training.metrics import Prediction
from training.threshold import Threshold, write_threshold
from training.unfinished import Unfinished

NAMES = ("nongesture", "gesture")
COUNTS = {"train": {"nongesture": 1, "gesture": 1}, "test": {"nongesture": 6, "gesture": 5}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("npz"), COUNTS, frames=16, height=64, width=64)


@pytest.fixture(scope="module")
def shards(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1, shard_mib=0.2))
    return output


@pytest.fixture(scope="module")
def made(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a head that tells clips apart, though nothing trained it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    model = build_model(ModelConfig("videomae-tiny", head_init_scale=20.0), NAMES)
    model.save(folder / "best", NAMES, {})
    (folder / "config.json").write_text(json.dumps({"dataset_home": str(shards), "positive": None}))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def expected(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Prediction]:
    """The rows of one quiet prediction of test."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("expected") / "run"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert typed(monkeypatch, folder) == 0
    return read_predictions(folder / "predictions-test.csv")[0]


def typed(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words), "--device", "cpu", "--batch-size", "2"])
    return command.run(predict.main)


def rows_of(path: Path) -> list[Prediction]:
    return read_predictions(path)[0]


def assert_same(found: list[Prediction], expected: list[Prediction]) -> None:
    assert [row.key for row in found] == [row.key for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6), one.key


def batches_seen(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Counts the clips that the model sees, call by call, and interrupts after so many."""
    seen: list[int] = []

    def watched(*arguments: Any) -> Any:
        for batch, rows in scored(*arguments):
            seen.append(len(batch))
            yield batch, rows
            if stop_after is not None and len(seen) == stop_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(predict, "scored", watched)
    return seen


def test_a_split_gets_its_csv_a_table_of_sources_and_pictures(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_threshold(run, Threshold(0.25, "gesture", 0.5, 1))
    assert typed(monkeypatch, run) == 0
    rows = rows_of(run / "predictions-test.csv")
    assert len(rows) == 11 and len({tuple(row.probabilities or ()) for row in rows}) == 11  # otherwise mixed-up rows could pass
    assert (run / "sources-test.csv").exists() and len(list((run / "plots").glob("test-*.png"))) == 4
    out = capsys.readouterr().out
    assert "test: loss" in out and "at val's threshold 0.2500" in out and "no intervals: 4 sources" in out
    assert {path.name for path in run.iterdir()} == {"best", "config.json", "threshold.json", "predictions-test.csv", "sources-test.csv", "plots"}


def test_an_interrupted_prediction_goes_on_with_what_is_missing(
    run: Path, expected: list[Prediction], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as first:
        batches_seen(first, stop_after=3)
        assert typed(first, run) == 130
    assert not (run / "predictions-test.csv").exists() and (run / "predictions-test.csv.part").exists()
    seen = batches_seen(monkeypatch)
    assert typed(monkeypatch, run) == 0
    assert seen == [2, 2, 1]  # of eleven clips six were there
    assert_same(rows_of(run / "predictions-test.csv"), expected)
    assert not list(run.glob("*.part")) and not list(run.glob(".*"))


def test_a_kill_in_the_middle_of_a_line_loses_that_line_alone(run: Path, expected: list[Prediction], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as first:
        batches_seen(first, stop_after=3)
        typed(first, run)
    part = run / "predictions-test.csv.part"
    part.write_bytes(part.read_bytes()[:-9])
    with monkeypatch.context() as second:
        seen = batches_seen(second, stop_after=1)
        assert typed(second, run) == 130 and seen == [2]
    assert len(part.read_text().splitlines()) == 1 + 5 + 2
    assert typed(monkeypatch, run) == 0
    assert_same(rows_of(run / "predictions-test.csv"), expected)


def test_when_all_clips_are_there_already_only_the_file_is_written(run: Path, expected: list[Prediction], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as first:
        first.setattr(predict, "write_predictions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert typed(first, run) == 130
    seen = batches_seen(monkeypatch)
    assert typed(monkeypatch, run) == 0 and seen == []
    assert_same(rows_of(run / "predictions-test.csv"), expected)


def test_an_unfinished_file_of_another_model_or_precision_is_not_gone_on_with(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as first:
        batches_seen(first, stop_after=1)
        typed(first, run)
    assert typed(monkeypatch, run, "--precision", "bf16") == 2
    assert "an unfinished run had another precision. Run that command" in capsys.readouterr().err
    build_model(ModelConfig("videomae-tiny", head_init_scale=2.0), NAMES).save(run / "best", NAMES, {})
    assert typed(monkeypatch, run) == 2
    assert "had another model" in capsys.readouterr().err
    (run / "predictions-test.csv.part").unlink()
    assert typed(monkeypatch, run) == 0


def test_a_file_that_changed_and_one_that_came_new_are_predicted_again(home: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sorted((home / "test" / "gesture").iterdir())
    folder = tmp_path / "new"
    folder.mkdir()
    for source in sources[:4]:
        shutil.copy2(source, folder)
    with monkeypatch.context() as first:
        batches_seen(first, stop_after=2)
        assert typed(first, run, folder, "--output", tmp_path / "out.csv") == 130
    (folder / sources[1].name).write_bytes(sources[0].read_bytes())
    shutil.copy2(sources[4], folder)
    seen = batches_seen(monkeypatch)
    assert typed(monkeypatch, run, folder, "--output", tmp_path / "out.csv") == 0
    assert seen == [2]  # the changed one and the new one
    rows = rows_of(tmp_path / "out.csv")
    assert len(rows) == 5 and rows[0].probabilities == pytest.approx(rows[1].probabilities, abs=1e-6)


def test_what_is_predicted_is_saved_while_the_rest_is_under_way(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "SAVE_S", -1.0)
    lengths: list[int] = []
    append = Unfinished.append

    def watched(self: Unfinished, rows: Any) -> None:
        append(self, rows)
        lengths.append(len(self.path.read_text().splitlines()))

    monkeypatch.setattr(Unfinished, "append", watched)
    assert typed(monkeypatch, run) == 0
    assert lengths == [3, 5, 7, 9, 11, 12, 12]  # the first line and two clips a batch; the end saves what is left


def test_views_are_averaged_and_their_file_stands_beside_the_plain_one(
    run: Path, expected: list[Prediction], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each: list[list[Any]] = []
    loader = Loader.evaluation
    for number in range(4):
        with monkeypatch.context() as one:
            one.setattr(Loader, "evaluation", lambda self, views, number=number: itertools.islice(loader(self, views), number, None, 4))
            one.setattr(Views, "count", 1)
            assert typed(one, run, "--views", "2x2", "--output", run / f"view{number}.csv") == 0
        each.append([row.probabilities for row in rows_of(run / f"view{number}.csv")])
    with monkeypatch.context() as first:
        batches_seen(first, stop_after=6)  # one batch of two clips in all its views, and half of the next's
        assert typed(first, run, "--views", "2x2") == 130
    assert len((run / "predictions-test-2x2.csv.part").read_text().splitlines()) == 1 + 2
    assert typed(monkeypatch, run, "--views", "2x3", "--output", run / "predictions-test-2x2.csv") == 2
    assert "another views" in capsys.readouterr().err
    assert typed(monkeypatch, run, "--views", "2x2") == 0
    found = np.asarray([row.probabilities for row in rows_of(run / "predictions-test-2x2.csv")])
    np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-6)
    assert np.abs(found - np.asarray([row.probabilities for row in expected])).max() > 1e-3
    assert not (run / "predictions-test.csv").exists()
    assert typed(monkeypatch, run, "--views", "2") == 2
    assert "--views 2: expected TxS" in capsys.readouterr().err


def test_another_homes_predictions_do_not_take_the_place_of_the_runs_own(
    home: Path, run: Path, expected: list[Prediction], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed(monkeypatch, run, "--dataset-home", home) == 0
    name = f"test-{home.name}"
    assert_same(rows_of(run / f"predictions-{name}.csv"), expected)  # the npz of bit-exact shards
    assert (run / f"sources-{name}.csv").exists() and len(list((run / "plots").glob(f"{name}-*.png"))) == 4
    assert not (run / "predictions-test.csv").exists()


def test_with_an_output_of_its_own_the_run_folder_stays_as_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(run.rglob("*"))
    assert typed(monkeypatch, run, "--output", tmp_path / "out.csv") == 0
    assert sorted(run.rglob("*")) == before


def test_clips_that_cannot_be_read_are_listed_and_tried_again(shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(shutil.copytree(shards, tmp_path / "broken"))
    tar = sorted((broken / "test").glob("*.tar"))[0]
    blob = bytearray(tar.read_bytes())
    index = blob.index(b"\x28\xb5\x2f\xfd", len(blob) // 3)  # where a Zstandard frame begins
    blob[index + 40] ^= 255
    tar.write_bytes(blob)
    assert typed(monkeypatch, run, "--dataset-home", broken) == 2
    with monkeypatch.context() as late:
        late.setattr(predict, "write_predictions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert typed(late, run, "--dataset-home", broken, "--max-bad-clips", 1) == 130
    assert len((run / "predictions-test-broken.csv.part").read_text().splitlines()) == 1 + 10
    seen = batches_seen(monkeypatch)
    assert typed(monkeypatch, run, "--dataset-home", broken, "--max-bad-clips", 1) == 0
    assert typed(monkeypatch, run, "--dataset-home", broken, "--max-bad-clips", 1, "--views", "2x2") == 0  # once, in however many views
    rows = rows_of(run / "predictions-test-broken.csv")
    assert seen[0] == 1 and sum(row.probabilities is None for row in rows) == 1 and len(rows) == 11


def test_elan_gets_a_file_of_merged_annotations_for_each_source(
    run: Path, expected: list[Prediction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, run, "--elan", tmp_path / "elan", "--threshold", 0) == 0
    files = {path.name: path.read_text() for path in (tmp_path / "elan").iterdir()}
    assert files == {  # four consecutive clips of 1300 ms a source, by name
        "test_gesture_001.txt": "prediction\t0\t2600\t2600\tgesture\n",
        "test_gesture_002.txt": "prediction\t0\t3900\t3900\tgesture\n",
        "test_nongesture_000.txt": "prediction\t0\t5200\t5200\tgesture\n",
        "test_nongesture_001.txt": "prediction\t0\t2600\t2600\tgesture\n",
    }
    assert "4 annotations of 4 sources" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "stored", "origin"), [((), None, "has no threshold.json"), ((), 1.0, "chosen on val"), (("--threshold", "0.3"), 1.0, "as asked")]
)
def test_the_threshold_of_val_decides_for_elan_unless_one_is_asked(
    run: Path, expected: list[Prediction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    words: tuple[str, ...], stored: float | None, origin: str,
) -> None:  # fmt: skip
    if stored is not None:
        write_threshold(run, Threshold(stored, "gesture", 0.9, 1))
    monkeypatch.setattr(command, "show_log", lambda: None)  # it would take the log from caplog
    caplog.set_level("INFO")
    assert typed(monkeypatch, run, "--elan", tmp_path / "elan", *words) == 0
    threshold = float(words[1]) if words else stored or 0.5
    covered = {path.stem: sum(int(line.split("\t")[3]) for line in path.read_text().splitlines()) for path in (tmp_path / "elan").iterdir()}
    taken = [row.source for row in expected if row.probabilities and row.probabilities[1] >= threshold]
    assert covered == {source: 1300 * taken.count(source) for source in {row.source for row in expected}}
    assert origin in caplog.text


def test_sources_in_several_splits_are_named_and_their_times_count_from_the_first_snippet_in_any(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "show_length_1000_sample_rate_1_iou_0.5"
    for name in ("train/a/000000003_film", "test/a/000000004_film", "test/a/000000000_own", "train/a/000000000_gap", "test/a/000000002_gap"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.npz").touch()
    facts = [ClipFacts("f", 0, "film", 4, 0, 1000, 5), ClipFacts("o", 0, "own", 0, 0, 1000, 5)]  # as the split alone tells them
    config = predict.PredictConfig(tmp_path, dataset_home=home, elan=tmp_path / "elan")
    timed = predict._timed(config, predict.Run(tmp_path, home, ("a", "b"), None), SimpleNamespace(facts=facts))
    assert [(fact.begin_ms, fact.end_ms) for fact in timed] == [(1000, 2000), (0, 1000)]
    assert "--elan: 1 source in several splits, film: times count from the first snippet in any of them" in caplog.text


def test_unknown_times_are_said_and_a_clips_length_gives_them(
    home: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "test" / "gesture"
    words = (run, folder, "--output", tmp_path / "out.csv", "--elan", tmp_path / "elan", "--threshold", 0)
    assert typed(monkeypatch, *words) == 0
    told = capsys.readouterr()
    assert "0 annotations of 0 sources" in told.out and "no file for 2 sources, test_gesture_001, test_gesture_002: begin and end" in told.err
    assert typed(monkeypatch, *words, "--clip-ms", 1000) == 0
    assert (tmp_path / "elan" / "test_gesture_002.txt").read_text() == "prediction\t0\t3000\t3000\tgesture\n"
    assert [row.end_ms for row in rows_of(tmp_path / "out.csv")] == [1000, 2000, 1000, 2000, 3000]


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.npz").touch()
    words = [tmp_path / name for name in ("run", "a.npz", "there.npz", "b")]
    assert typed(monkeypatch, *words, "--output", tmp_path / "no" / "out.csv") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: 4 things are missing or wrong:\n") and len(told.splitlines()) == 5
    for name, fault in (("run", "no such folder"), ("a.npz", "no such file"), ("b", "no such file"), ("no/out.csv", "expected a file in a folder that exists")):
        assert any(f"{tmp_path / name}: " in line and fault in line for line in told.splitlines()), told
    assert typed(monkeypatch, tmp_path, "--dataset-home", tmp_path / "no") == 2
    told = capsys.readouterr().err
    assert "it has no config.json" in told and f"--dataset-home {tmp_path / 'no'}: no such folder" in told


def test_an_unfinished_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path / "out.csv", {"model": "abc"})
    for text in ("[]\n", "nonsense\n", '{"model": "abc"}\n[1]\n'):
        unfinished.path.write_text(text)
        with pytest.raises(InputError, match=r"out\.csv\.part: is damaged .*Remove it"):
            unfinished.open()
    unfinished.path.write_text("")
    assert unfinished.open() == {} and unfinished.open() == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda run: [run, "--threshold", "0.5"], "only --elan DIR uses them"),
        (lambda run: [run, "--elan", "x", "--threshold", "2"], "--threshold 2.0: expected 0 … 1"),
        (lambda run: [run, "--elan", run / "config.json"], "expected a folder, found a file"),
        (lambda run: [run, "--elan", "x", "--clip-ms", "0"], "--clip-ms 0: expected at least 1"),
        (lambda run: [run, run, "--split", "test"], "leave them out with paths"),
        (lambda run: [run, "--output", "nowhere/out.csv"], "expected a file in a folder that exists"),
        (lambda run: [run / "best"], "Give the folder above it."),
    ],
)
def test_wrong_words_are_one_line(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Callable[[Path], list[Any]], message: str
) -> None:
    assert typed(monkeypatch, *words(made)) == 2
    assert message in capsys.readouterr().err
