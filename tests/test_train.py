"""train.py and predict.py as a user runs them, on tell-tale clips and the tiny models."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import predict
import train
import training.judge
from clips import command
from clips.errors import InputError
from convert.pack import PackConfig, pack
from models import load_trained
from tests.making import write_home
from tests.making_models import FAMILIES, clips, plain_logits, plain_model, write_checkpoint
from training.distributed import Group
from training.evaluation import Scores, probabilities
from training.precision import Precision
from training.run_folder import RunFolder

COUNTS = {"train": {"nongesture": 7, "gesture": 6}, "val": {"nongesture": 3, "gesture": 2}, "test": {"nongesture": 2, "gesture": 3}}
ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("npz"), COUNTS, frames=17, height=72, width=72, padded_every=5)


@pytest.fixture(scope="module")
def shards(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1, shard_mib=0.5))
    return output


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    return run(shards, tmp_path_factory.mktemp("runs") / "two")


def run(home: Path, folder: Path, *flags: str) -> Path:
    """Trains in this process, as the command line would."""
    words = ["--dataset-home", str(home), "--logger-folder", str(folder), "--epochs", "2", "--model-name", "videomae-tiny", "--batch-size", "4"]
    config = train.parse([*words, "--log-every", "1", "--device", "cpu", "--keep-optimizer", *flags])
    train.train(config, Group(0, 1, 0, torch.device("cpu"), "single"), RunFolder(folder))
    return folder


def records(folder: Path, prefix: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that have values of `prefix`, without those of the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("clips_per_s", "step_ms", "data_wait_percent", "longest_wait_ms", "longest_wait")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in lines if any(name.startswith(prefix) for name in line)]


def last_state(folder: Path) -> dict[str, Any]:
    return torch.load(sorted((folder / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = last_state(one)["model"], last_state(other)["model"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_npz_and_bit_exact_shards_train_to_the_same_weights_and_metrics(home: Path, finished: Path, tmp_path: Path) -> None:
    from_npz = run(home, tmp_path / "npz")
    assert records(from_npz, "train/") == records(finished, "train/")
    assert records(from_npz, "val/") == records(finished, "val/")
    assert_same_weights(from_npz, finished)


def test_a_run_continued_at_an_epochs_end_equals_the_quiet_run(shards: Path, finished: Path, tmp_path: Path) -> None:
    continued = run(shards, tmp_path / "run", "--epochs", "1")
    assert (continued / "done").exists()
    run(shards, continued)
    assert records(continued, "train/") == records(finished, "train/")
    assert_same_weights(continued, finished)


def test_what_was_logged_after_the_checkpoint_is_cut_back(shards: Path, finished: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", "--epochs", "1")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epoch": 1, "train/loss": 99.0}\n{"step": 6, "ep')
    run(shards, folder)
    assert records(folder, "train/") == records(finished, "train/")


def test_a_run_continues_from_the_npz_folder_with_other_threads(home: Path, shards: Path, finished: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", "--epochs", "1")
    run(home, folder, "--threads", "3", "--prefetch", "1")
    assert_same_weights(folder, finished)


def test_a_finished_run_says_so_and_changes_nothing(shards: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        run(shards, finished)
    assert "this run is finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_another_configuration_in_the_same_folder_names_the_flags(shards: Path, finished: Path) -> None:
    with pytest.raises(InputError, match=r"--batch-size was 4, now 2.*--seed was 0, now 7"):
        run(shards, finished, "--batch-size", "2", "--seed", "7")


def test_another_set_of_clips_in_the_same_folder_is_an_error(tmp_path: Path, finished: Path) -> None:
    fewer = write_home(tmp_path, {**COUNTS, "train": {"nongesture": 6, "gesture": 6}}, frames=17, height=72, width=72)
    with pytest.raises(InputError, match=r"data\.train was"):
        run(fewer, finished)


def test_micro_batches_accumulate_to_the_gradients_of_the_whole_batch(shards: Path, finished: Path, tmp_path: Path) -> None:
    accumulated = run(shards, tmp_path / "run", "--micro-batch", "2")
    for ours, whole in zip(records(accumulated, "train/"), records(finished, "train/"), strict=True):
        assert ours["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-4)
        assert ours["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-3)


def test_two_ranks_train_as_one_does(shards: Path, finished: Path, tmp_path: Path) -> None:
    words = ["--dataset-home", shards, "--logger-folder", tmp_path / "run", "--epochs", 2, "--model-name", "videomae-tiny", "--batch-size", 4, "--log-every", 1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone", str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for ours, single in zip(records(tmp_path / "run", "train/"), records(finished, "train/"), strict=True):
        assert ours["train/loss"] == pytest.approx(single["train/loss"], rel=1e-4)
    for ours, single in zip(records(tmp_path / "run", "val/"), records(finished, "val/"), strict=True):
        assert ours["val/confusion"] == single["val/confusion"]
        assert ours["val/loss"] == pytest.approx(single["val/loss"], rel=1e-4)
    assert len(rows(tmp_path / "run" / "predictions-test.csv")) == 5


def test_the_run_folder_explains_itself(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "env.json", "metrics.jsonl", "tb", "checkpoints", "best", "predictions-test.csv", "done"} <= names
    config = json.loads((finished / "config.json").read_text())
    assert config["epochs"] == 2 and config["lr"] == 5e-4 and config["class_names"] == ["nongesture", "gesture"]
    assert len({path.stat().st_mode for path in (finished / "best").iterdir()}) == 1  # the umask's, the weights' too
    line = records(finished, "val/")[0]
    assert sum(map(sum, line["val/confusion"])) == 5
    assert {"val/loss", "val/accuracy", "val/balanced_accuracy", "val/f1", "val/auroc", "val/average_precision"} <= line.keys()


@pytest.mark.parametrize(("metric", "sign"), [("auroc", 1), ("loss", -1)])
def test_best_is_the_epoch_with_the_best_val_metric(shards: Path, tmp_path: Path, metric: str, sign: int) -> None:
    folder = run(shards, tmp_path / "run", "--epochs", "4", "--lr", "0.1", "--best-metric", metric)
    values = [sign * line[f"val/{metric}"] for line in records(folder, "val/")]
    assert f"epoch: {values.index(max(values)) + 1}\n" in (folder / "best" / "README.md").read_text() + "\n"


def test_a_diverged_run_stops_keeps_its_best_and_says_why(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def diverges(*arguments: Any, **named: Any) -> Scores:
        calls.append(1)
        scores = probabilities(*arguments, **named)
        return scores if len(calls) == 1 else Scores(np.full_like(scores.probabilities, np.nan), {})

    monkeypatch.setattr(training.judge, "probabilities", diverges)
    folder = tmp_path / "run"
    words = ["--dataset-home", shards, "--logger-folder", folder, "--epochs", "3", "--model-name", "videomae-tiny", "--batch-size", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    assert command.run(train.main) == 2
    assert "diverged" in json.loads((folder / "stopped.json").read_text())["reason"]
    assert "epoch: 1" in (folder / "best" / "README.md").read_text() and not (folder / "done").exists()


def test_an_interrupt_before_the_run_begins_leaves_no_folder_and_later_says_so(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--dataset-home", shards, "--logger-folder", tmp_path / "run", "--epochs", "1", "--model-name", "videomae-tiny", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as early:
        early.setattr(train, "build", interrupted)
        assert command.run(train.main) == 130
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as late:
        late.setattr(train, "validate", interrupted)
        assert command.run(train.main) == 130
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"reason": "interrupted"}
    assert command.run(train.main) == 0
    assert (tmp_path / "run" / "done").exists() and not (tmp_path / "run" / "stopped.json").exists()


def test_the_speed_counts_every_clip_of_a_step(finished: Path) -> None:
    for line in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()):
        for prefix in ("train", "epoch"):
            if f"{prefix}/clips_per_s" in line:
                assert line[f"{prefix}/clips_per_s"] * line[f"{prefix}/step_ms"] / 1000 == pytest.approx(4)  # --batch-size


def test_clip_grad_reaches_the_step(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = Precision.step

    def watched(self: Precision, optimizer: Any, parameters: Any, clip_grad: float) -> torch.Tensor:
        seen.append(clip_grad)
        return step(self, optimizer, parameters, clip_grad)

    monkeypatch.setattr(Precision, "step", watched)
    run(shards, tmp_path / "run", "--clip-grad", "0.25", "--epochs", "1")
    assert seen == [0.25] * 3


def test_the_epochs_loss_is_the_mean_over_its_steps(finished: Path) -> None:
    lines = records(finished, "train/")
    for epoch, line in enumerate(records(finished, "epoch/")):
        steps = [one["train/loss"] for one in lines if one["epoch"] == epoch]
        assert len(steps) == 3 and line["epoch/loss"] == pytest.approx(sum(steps) / 3, rel=1e-6)


def test_a_fraction_trains_on_fewer_clips_and_positive_turns_the_metrics(shards: Path, finished: Path, tmp_path: Path) -> None:
    folder = run(shards, tmp_path / "run", "--fraction", "0.5", "--batch-size", "7", "--positive", "nongesture", "--epochs", "1")
    assert records(folder, "train/")[-1]["step"] == 1  # four of seven and three of six clips
    line, confusion = records(folder, "val/")[0], np.array(records(folder, "val/")[0]["val/confusion"])
    assert line["val/f1"] == pytest.approx(2 * confusion[0, 0] / (confusion[0].sum() + confusion[:, 0].sum()))
    stored = json.loads((folder / "config.json").read_text())["data"], json.loads((finished / "config.json").read_text())["data"]
    assert stored[0]["train"] != stored[1]["train"] and stored[0]["val"] == stored[1]["val"] and stored[0]["test"] == stored[1]["test"]


def test_what_is_wrong_with_test_shows_before_training(tmp_path: Path) -> None:
    home = write_home(tmp_path, COUNTS, frames=17, height=72, width=72)
    broken = next((home / "test" / "gesture").iterdir())
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(InputError, match="test/gesture"):
        run(home, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_file_fills_the_defaults(shards: Path, finished: Path, tmp_path: Path) -> None:
    config = train.parse(["--config", str(finished / "config.json"), "--logger-folder", str(tmp_path), "--lr", "0.1"])
    assert (config.batch_size, config.model.model_name, config.schedule.lr, config.data.dataset_home) == (4, "videomae-tiny", 0.1, shards)
    assert config.logger_folder == tmp_path
    assert train.parse([f"--config={finished / 'config.json'}", "--logger-folder", str(tmp_path)]).batch_size == 4


def test_a_config_file_with_an_unknown_flag_offers_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"epoch": 3}')
    with pytest.raises(InputError, match=r"epoch is no flag.*Did you mean epochs"):
        train.parse(["--config", str(tmp_path / "config.json")])


def test_vals_threshold_is_kept_and_applied_to_test_beside_intervals_sources_and_pictures(finished: Path) -> None:
    threshold = json.loads((finished / "threshold.json").read_text())
    assert threshold["positive"] == "gesture" and f"epoch: {threshold['epoch']}\n" in (finished / "best" / "README.md").read_text() + "\n"
    found = [(float(row["p_gesture"]) >= threshold["value"], row["label"] == "gesture") for row in rows(finished / "predictions-test.csv")]
    line = records(finished, "test/")[-1]
    hits, either = sum(taken and label for taken, label in found), sum(taken + label for taken, label in found)
    assert (line["test/threshold"], line["test/f1_at_threshold"]) == (threshold["value"], pytest.approx(2 * hits / either))
    assert line["test/intervals"] == {}  # of two sources there are none
    assert (finished / "sources-test.csv").exists() and len(list((finished / "plots").glob("test-*.png"))) == 4
    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    assert {f"test/{name}" for name in ("roc", "pr", "calibration", "confusion")} <= set(events.Tags()["images"])


def test_views_are_averaged_on_test_as_predict_does(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(shards, tmp_path / "run", "--epochs", "1", "--views", "2x3", "--head-init-scale", "20")
    assert predicted(monkeypatch, folder, "--output", tmp_path / "again.csv", "--views", "2x3", "--batch-size", 2) == 0
    assert predicted(monkeypatch, folder, "--output", tmp_path / "plain.csv") == 0
    ours, again, plain = (
        [float(row["p_gesture"]) for row in rows(path)] for path in (folder / "predictions-test.csv", tmp_path / "again.csv", tmp_path / "plain.csv")
    )
    assert ours == pytest.approx(again, abs=1e-5) and len(ours) == 5 and ours != pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "14"), "--batch-size 14: an epoch has 13 clips"),
        (("--model-name", "videomea-tiny"), "Did you mean videomae-tiny"),
        (("--micro-batch", "3"), "--micro-batch 3: expected a divisor of the 4 clips"),
        (("--loader", "webdatset"), "Did you mean webdataset"),
        (("--fraction", "0"), "--fraction 0.0: expected above 0"),
        (("--epochs", "0"), "--epochs 0: expected at least 1"),
        (("--positive", "gestur"), "Did you mean gesture"),
        (("--dataset-home", "nowhere"), "--dataset-home nowhere: no such folder"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_no_folder(shards: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(shards, tmp_path / "run", *flags)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_three_classes_go_the_whole_way(tmp_path: Path) -> None:
    three = {"beat": 3, "iconic": 3, "none": 3}
    home = write_home(tmp_path / "npz", {"train": three, "val": three, "test": {"beat": 2, "none": 2}}, frames=16, height=64, width=64)
    pack(PackConfig(home, tmp_path / "shards", workers=1))
    folder = run(tmp_path / "shards", tmp_path / "run", "--model-name", "timesformer-tiny")
    found = rows(folder / "predictions-test.csv")
    assert len(found) == 4 and {"p_beat", "p_iconic", "p_none"} <= found[0].keys()
    assert sum(float(found[0][f"p_{name}"]) for name in three) == pytest.approx(1)
    assert np.array(records(folder, "val/")[0]["val/confusion"]).shape == (3, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_plain_transformers_is_trained_saved_and_read_again_by_both(shards: Path, tmp_path: Path, family: str) -> None:
    start = plain_model(family)
    folder = run(shards, tmp_path / "run", "--model-name", str(write_checkpoint(tmp_path / "start", start)), "--epochs", "1")
    ours, names = load_trained(folder / "best")
    plain = type(start).from_pretrained(folder / "best").eval()
    assert names == ("nongesture", "gesture") and plain.config.id2label == {0: "nongesture", 1: "gesture"}
    with torch.no_grad():
        logits = ours(clips())
    order = "bgr" if family == "timesformer" else "rgb"  # as the authors trained on Something-Something
    torch.testing.assert_close(logits, plain_logits(plain, clips(), order), rtol=0, atol=1e-5)
    assert any(not torch.equal(value, start.state_dict()[name]) for name, value in plain.state_dict().items() if "layernorm" in name)  # it was trained


def test_without_val_and_test_the_last_epoch_is_the_best(tmp_path: Path) -> None:
    home = write_home(tmp_path / "npz", {"train": {"nongesture": 3, "gesture": 3}}, frames=16, height=64, width=64)
    folder = run(home, tmp_path / "run")
    assert (folder / "done").exists() and not (folder / "predictions-test.csv").exists()
    assert "epoch: 2" in (folder / "best" / "README.md").read_text()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def predicted(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    return command.run(predict.main)


def test_predict_gives_what_training_wrote(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert predicted(monkeypatch, finished, "--output", tmp_path / "again.csv", "--batch-size", 2) == 0
    again, before = rows(tmp_path / "again.csv"), rows(finished / "predictions-test.csv")
    assert [row["key"] for row in again] == [row["key"] for row in before]
    for ours, theirs in zip(again, before, strict=True):
        assert float(ours["p_gesture"]) == pytest.approx(float(theirs["p_gesture"]), abs=1e-5)
        assert ours["label"] == theirs["label"] and ours["source"] == theirs["source"]
    assert "test: loss" in capsys.readouterr().out


def test_predict_takes_unlabelled_npz_flat_or_nested_without_keypoints(home: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat, nested = tmp_path / "flat.npz", tmp_path / "folder" / "deep" / "one.npz"
    nested.parent.mkdir(parents=True)
    source = next((home / "test" / "gesture").iterdir())
    for path in (flat, nested):
        np.savez_compressed(path, video=np.load(source)["video"])
    assert predicted(monkeypatch, finished, flat, tmp_path / "folder", "--output", tmp_path / "out.csv") == 0
    found = rows(tmp_path / "out.csv")
    assert [row["key"] for row in found] == [str(path.with_suffix("")) for path in (flat, nested)]
    expected = next(row for row in rows(finished / "predictions-test.csv") if row["key"].endswith(source.stem))
    for row in found:
        assert row["label"] == "" and float(row["p_gesture"]) == pytest.approx(float(expected["p_gesture"]), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda run: [run.parent / "none"], "expected the folder of a run"),
        (lambda run: [run, "--split", "vall"], "no split vall"),
        (lambda run: [run, run / "best"], "--output: missing"),
        (lambda run: [run, run / "best", "--output", run.parent / "x.csv"], "expected an npz file or a folder that holds some"),
    ],
)
def test_predict_explains_wrong_input(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Callable[[Path], list[Any]], message: str
) -> None:
    assert predicted(monkeypatch, *words(finished)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
