"""--dry-run and --overfit-batch, as a user types them: they try everything and leave nothing."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from clips.errors import InputError
from convert.pack import PackConfig, pack
from loaders.home import open_home
from tests.making import write_home
from training.distributed import Group
from training.rehearsal import RehearsalConfig, duration, learn_by_heart, megabytes, needs, timed_steps
from training.run_folder import RunFolder

COUNTS = {"train": {"nongesture": 9, "gesture": 9}, "val": {"nongesture": 1, "gesture": 2}, "test": {"nongesture": 2, "gesture": 1}}
ALONE = Group(0, 1, 0, torch.device("cpu"), "single")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_home(tmp_path_factory.mktemp("npz"), COUNTS, frames=17, height=72, width=72, padded_every=5)
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1, shard_mib=0.5))
    return output


def run(home: Path, folder: Path, *flags: str) -> None:
    words = ["--dataset-home", str(home), "--logger-folder", str(folder), "--epochs", "2", "--model-name", "videomae-tiny", "--batch-size", "4"]
    train.train(train.parse([*words, "--device", "cpu", "--threads", "1", *flags]), ALONE, RunFolder(folder))


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_tries_every_part_and_leaves_no_file(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(shards, tmp_path / "not" / "there" / "yet", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    lines = [line for line in caplog.messages if line.startswith("dry run: ")]
    assert [line.split(":")[1].strip() for line in lines[:7]] == [*(f"step {n} of 4" for n in (1, 2, 3, 4)), "val", "test", lines[6].split(":")[1].strip()]
    assert "an epoch" in lines[6] and "in all" in lines[6]
    assert "a checkpoint" in lines[7] and "are free" in lines[7]


def test_a_dry_run_beside_a_run_leaves_it_alone(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", "--epochs", "1")
    before = files_of(tmp_path)
    run(shards, tmp_path / "run", "--dry-run")
    assert files_of(tmp_path) == before
    with pytest.raises(InputError, match="another configuration: --seed was 0, now 1"):
        run(shards, tmp_path / "run", "--dry-run", "--seed", "1")


def test_the_run_after_a_dry_run_is_the_run_without(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", "--dry-run", "--epochs", "1")
    run(shards, tmp_path / "run", "--epochs", "1")
    assert (tmp_path / "run" / "done").exists()
    assert not {"dry_run", "overfit_batch"} & json.loads((tmp_path / "run" / "config.json").read_text()).keys()


def test_a_folder_that_cannot_be_written_shows_in_a_dry_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match="can be written to; found: Permission denied"):
        run(shards, tmp_path / "run", "--dry-run")


def test_a_file_system_that_is_too_small_shows_in_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("checkpoints", 3000), ("best", 500)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(size))
    asked = (0.5, 100, 36, tmp_path / "checkpoints", tmp_path / "best", Path("run"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    speed, _ = needs(*asked)
    assert "50 s an epoch and 30.0 min in all at 0.50 s a step" in speed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9_999}))
    with pytest.raises(InputError, match=r"run: a run writes up to 0 MB .* Make room"):
        needs(*asked)


def test_a_loss_that_is_not_finite_ends_a_dry_run() -> None:
    losses = iter([0.7, float("nan")])
    with pytest.raises(InputError, match="the loss of step 2 is nan"):
        timed_steps(lambda: torch.tensor(next(losses)), 5)


def test_one_batch_is_learned_by_heart_whatever_the_recipe(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = ["--recipe", "videomae-ssv2", "--layer-decay", "1", "--lr", "0.05", "--ema", "0.9"]
    with caplog.at_level(logging.INFO):
        run(shards, tmp_path / "run", "--overfit-batch", "40", *recipe)
    assert "4 of the 4 clips are told right: loss, labels, weights and rate fit together" in caplog.messages[-1]
    last = float(caplog.messages[-1].split(" to ")[1].split()[0])
    assert last < 0.1
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_is_not_learned_is_an_error_with_the_numbers(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--overfit-batch 1: loss 0\.69\d\d to 0\.69\d\d in 1 steps at a rate of .*Expected all\. The rate is --lr x"):
        run(shards, tmp_path / "run", "--overfit-batch", "1", "--lr", "1e-6")


def test_a_batch_of_one_class_proves_nothing(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="clips of one class alone"):
        run(shards, tmp_path / "run", "--overfit-batch", "5", "--batch-size", "1")


def test_the_loss_of_learning_by_heart_is_the_mean_over_ranks(caplog: pytest.LogCaptureFixture) -> None:
    class TwoRanks(Group):
        def sum(self, values: list[float]) -> list[float]:
            return [value + 1.0 for value in values]

    losses = iter([3.0, 1.0])
    with caplog.at_level(logging.INFO):
        learn_by_heart(lambda: torch.tensor(next(losses)), lambda: (2, 2), 2, 0.1, TwoRanks(0, 2, 0, torch.device("cpu"), "single"))
    assert "loss 2.0000 to 1.0000 in 2 steps" in caplog.text


@pytest.mark.parametrize(("flags", "message"), [(["--overfit-batch", "0"], "at least 1"), (["--dry-run", "--overfit-batch", "5"], "one of them")])
def test_flags_that_make_no_sense_are_named(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, tmp_path / "run", *flags)


def test_clips_with_fewer_valid_frames_than_asked_are_counted(tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(shards, tmp_path / "run", "--dry-run")
    facts = open_home(shards).sources["train"].facts
    short = [fact.frames_valid for fact in facts if fact.frames_valid < 16]
    assert short
    line = next(line for line in caplog.messages if line.startswith("frames: "))
    assert line.startswith(f"frames: {len(short)} of 18 training clips have fewer valid frames than the 16 asked, the fewest {min(short)}: ")


@pytest.mark.parametrize(("seconds", "words"), [(0.05, "0.05 s"), (45, "45 s"), (119, "119 s"), (720, "12.0 min"), (7200, "2.0 h"), (172800, "2.0 days")])
def test_durations_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_are_said_in_their_unit() -> None:
    assert (megabytes(12_300_000), megabytes(3_456_000_000)) == ("12 MB", "3.5 GB")
    assert not RehearsalConfig().is_asked


def test_a_plan_says_how_many_jobs_a_run_takes_and_leaves_no_file(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(shards, tmp_path / "run", "--plan", "24", "--clips-per-s", "0.001", "--epochs", "40")
    assert list(tmp_path.iterdir()) == []
    # 16 clips trained and 3 evaluated at twice the speed are 17,500 s an epoch, 4.86 h; 40 of them 194 h
    assert any("4.9 h" in line for line in caplog.messages), caplog.messages[-6:]
    with pytest.raises(InputError, match="--plan: expected alone"):
        run(shards, tmp_path / "run", "--plan", "24", "--dry-run")
