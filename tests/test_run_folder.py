"""The run folder: what a start finds, what may change, and logs that can be cut back."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clips.errors import InputError
from training.run_folder import RunFolder, State

CONFIG = {"model": "videomae-tiny", "epochs": 3, "batch_size": 64, "lr_milestones": (35, 80), "threads": 4, "stage": None}


def opened(run: RunFolder, config: Mapping[str, Any], free: Collection[str] = ()) -> State:
    """What train.py does at a start: it looks, and begins unless the run is finished."""
    state = run.look(config, free)
    if state != "finished":
        run.begin(config)
    return state


def changed(**changes: object) -> dict:
    return {**CONFIG, **changes}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: steps and values."""
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_an_absent_or_empty_folder_starts_and_explains_itself(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "deep" / "run", tmp_path / "empty"):
        assert opened(RunFolder(path), CONFIG) == "new"
        assert json.loads((path / "config.json").read_text()) == changed(lr_milestones=[35, 80])
        (start,) = json.loads((path / "env.json").read_text())
        assert {"git", "python", "versions", "host", "cpu", "gpus", "date"} <= set(start)
        assert start["versions"]["torch"]
        assert sorted(file.name for file in path.iterdir()) == ["config.json", "env.json"]


def test_the_same_configuration_continues_and_each_start_is_kept(tmp_path: Path) -> None:
    opened(RunFolder(tmp_path), CONFIG)
    assert opened(RunFolder(tmp_path), CONFIG) == "resume"
    assert len(json.loads((tmp_path / "env.json").read_text())) == 2


def test_a_finished_run_says_so_and_stays_untouched(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    opened(run, CONFIG)
    run.finish()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert opened(RunFolder(tmp_path), CONFIG) == "finished"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "done" in before


def test_more_epochs_wake_a_finished_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    opened(run, CONFIG)
    run.finish()
    assert opened(RunFolder(tmp_path), changed(epochs=4)) == "resume"
    assert not (tmp_path / "done").exists()
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 4
    with pytest.raises(InputError, match=r"--epochs was 4, now 3 \(epochs may only grow\)"):
        opened(RunFolder(tmp_path), CONFIG)


def test_patience_may_change_and_more_of_it_wakes_a_run_that_has_ended(tmp_path: Path) -> None:
    opened(RunFolder(tmp_path), changed(patience=3))
    assert opened(RunFolder(tmp_path), changed(patience=2)) == "resume"
    assert json.loads((tmp_path / "config.json").read_text())["patience"] == 2
    RunFolder(tmp_path).finish()
    for patience, state in ((1, "finished"), (2, "finished"), (3, "resume"), (None, "resume")):
        assert RunFolder(tmp_path).look(changed(patience=patience)) == state
    opened(RunFolder(tmp_path), changed(patience=None))
    RunFolder(tmp_path).finish()
    assert opened(RunFolder(tmp_path), changed(patience=1)) == "finished"  # without patience all epochs were trained


def test_free_flags_may_change_and_the_new_value_is_written(tmp_path: Path) -> None:
    opened(RunFolder(tmp_path), CONFIG)
    assert opened(RunFolder(tmp_path), changed(threads=16, stage="stage-x"), free={"threads", "stage"}) == "resume"
    assert json.loads((tmp_path / "config.json").read_text())["threads"] == 16


def test_another_configuration_names_every_flag_with_both_values(tmp_path: Path) -> None:
    one = {"data": {"train": "abc", "val": "x"}, "batch_size": 64, "lr_milestones": (35, 80), "stage": None, "threads": 4}
    other = {"data": {"train": "def", "val": "x"}, "batch_size": 32, "lr_milestones": (), "stage": "ssd", "threads": 8}
    opened(RunFolder(tmp_path), one)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError) as error:
        opened(RunFolder(tmp_path), other, free={"threads"})
    assert "--batch-size was 64, now 32; data.train was abc, now def; --lr-milestones was 35 80, now empty; --stage was not set, now ssd." in str(error.value)
    assert "threads" not in str(error.value) and "another folder" in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_flag_that_only_one_start_has_differs(tmp_path: Path) -> None:
    opened(RunFolder(tmp_path), CONFIG)
    with pytest.raises(InputError, match=r"--layer-decay was not set, now 0\.75"):
        opened(RunFolder(tmp_path), changed(layer_decay=0.75))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"found thesis\.tex\. Give another folder"):
        opened(RunFolder(tmp_path), CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="found a file"):
        opened(RunFolder(tmp_path / "thesis.tex"), CONFIG)


def test_a_jobs_output_and_the_rest_of_a_killed_start_are_no_obstacle(tmp_path: Path) -> None:
    for name in ("slurm-12.out", "slurm-12.err", ".config.json.host.1.abcd.tmp"):
        (tmp_path / name).write_text("")
    assert opened(RunFolder(tmp_path), CONFIG) == "new"


def test_a_damaged_configuration_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    for content in ("{", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json: expected"):
            opened(RunFolder(tmp_path), CONFIG)


def test_a_stop_says_why_and_the_next_start_removes_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    opened(run, CONFIG)
    run.stop("signal SIGUSR2")
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": "signal SIGUSR2"}
    assert opened(RunFolder(tmp_path), CONFIG) == "resume"
    assert not (tmp_path / "stopped.json").exists()


def test_only_rank_0_writes(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "run", is_main=False)
    other.log({"step": 1, "loss": 0.5})
    other.cut_back(0)
    other.stop("no")
    other.finish()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="rank 0"):
        opened(other, CONFIG)


def test_a_record_is_one_line_and_its_numbers_are_in_tensorboard_at_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    opened(run, CONFIG)
    run.log({"step": 1, "loss": 0.5, "split": "val", "confusion": [[1, 2], [3, 4]], "auroc": None, "resumed": True})
    run.log({"step": 2, "loss": math.nan})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "split": "val", "confusion": [[1, 2], [3, 4]], "auroc": None, "resumed": True},
        {"step": 2, "loss": None},
    ]
    (first, second) = scalars(tmp_path, "loss")  # before the file is closed
    assert first == (1, 0.5) and second[0] == 2 and math.isnan(second[1])
    board = EventAccumulator(str(tmp_path / "tb"))
    assert board.Reload().Tags()["scalars"] == ["loss"]
    run.finish()


def test_a_resume_cuts_back_to_its_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    opened(run, CONFIG)
    for step in (10, 20, 30):
        run.log({"step": step, "loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while it wrote
    resumed = RunFolder(tmp_path)
    opened(resumed, CONFIG)
    with caplog.at_level(logging.WARNING):
        resumed.cut_back(20)
    assert "metrics.jsonl: line 4 is damaged" in caplog.text
    resumed.log({"step": 30, "loss": 31.0})
    assert lines(tmp_path) == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": 31.0}]
    resumed.stop("preempted")
    resumed.log({"step": 40, "loss": 40.0})
    assert scalars(tmp_path, "loss") == [(10, 10.0), (20, 20.0), (30, 31.0), (40, 40.0)]
    run.finish()
    resumed.finish()


def test_a_run_without_a_checkpoint_starts_its_logs_anew(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    opened(run, CONFIG)
    run.cut_back(0)
    run.log({"step": 1, "loss": 1.0})
    run.cut_back(0)
    assert lines(tmp_path) == []
    run.log({"step": 1, "loss": 2.0})
    assert (lines(tmp_path), scalars(tmp_path, "loss")) == ([{"step": 1, "loss": 2.0}], [(1, 2.0)])
    run.finish()
