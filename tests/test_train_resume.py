"""Runs that are killed or asked to end anywhere, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train
import training.step
from clips.errors import InputError
from convert.pack import PackConfig, pack
from loaders.certify import CertifyConfig, certify
from tests.making import write_home
from training.distributed import Group
from training.journal import Journal
from training.run_folder import RunFolder

COUNTS = {"train": {"nongesture": 11, "gesture": 9}, "val": {"nongesture": 5, "gesture": 5}, "test": {"nongesture": 4, "gesture": 5}}
ROOT = Path(train.__file__).parent
CLOCK = ("clips_per_s", "step_ms", "data_wait_percent", "longest_wait_ms", "longest_wait")
EVERYTHING = ("--recipe", "videomae-ssv2", "--ema", "0.9", "--batch-size", "4", "--epochs", "2", "--log-every", "2")  # ten steps an epoch, clips twice


class KilledError(Exception):
    """What stands for a kill in a test."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_home(tmp_path_factory.mktemp("npz"), COUNTS, frames=17, height=72, width=72)
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1, shard_mib=0.5))
    return output


@pytest.fixture(scope="module")
def quiet(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(shards, tmp_path_factory.mktemp("runs") / "quiet")


def words(home: Path, folder: Path, *flags: str) -> list[str]:
    kept = ["--model-name", "videomae-tiny", "--device", "cpu", "--threads", "1", "--keep-optimizer", *EVERYTHING]
    return ["--dataset-home", str(home), "--logger-folder", str(folder), *kept, *flags]


def run(home: Path, folder: Path, *flags: str) -> Path:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.train(train.parse(words(home, folder, *flags)), Group(0, 1, 0, torch.device("cpu"), "single"), RunFolder(folder))
    finally:
        torch.set_num_threads(before)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(CLOCK)} for line in found]


def last_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(sorted((folder / "checkpoints").glob("*.pt"))[-1], weights_only=True)
    return state


def assert_same_run(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    assert (one / "certificate.json").read_bytes() == (other / "certificate.json").read_bytes()
    assert (one / "predictions-test.csv").read_bytes() == (other / "predictions-test.csv").read_bytes()
    for part in ("model", "ema"):
        ours, theirs = (last_state(folder)[part] for folder in (one, other))
        ours, theirs = (ours, theirs) if part == "model" else (ours["average"], theirs["average"])
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process ends right after that many steps from the start of the run, before anything is saved."""
    done = Journal.step

    def dies(self: Journal, *arguments: Any) -> None:
        done(self, *arguments)
        if self.progress.step == step:
            raise KilledError

    monkeypatch.setattr(Journal, "step", dies)


def test_a_run_killed_at_five_steps_ends_bit_for_bit_as_the_quiet_one(
    shards: Path, quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With everything that draws: repeats, colours, erasing, mixup, cutmix, drop path, EMA; a checkpoint every second step."""
    folder = tmp_path / "run"
    for step in (3, 4, 9, 13, 19):
        with monkeypatch.context() as patched, pytest.raises(KilledError):
            killed_at(patched, step)
            run(shards, folder, "--checkpoint-minutes", "1e-9")
        assert step - 3 <= last_state(folder)["progress"]["step"] < step  # a wish is granted one step later
    run(shards, folder)
    assert_same_run(folder, quiet)
    assert certify(CertifyConfig(folder)) == 0
    capsys.readouterr()


def test_a_run_killed_without_a_checkpoint_in_the_epoch_begins_it_again(
    shards: Path, quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        killed_at(patched, 17)
        run(shards, tmp_path / "run")
    assert last_state(tmp_path / "run")["progress"]["step"] == 10
    assert_same_run(run(shards, tmp_path / "run"), quiet)


def test_a_run_killed_between_a_checkpoint_and_best_makes_best_good(shards: Path, quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    for name in ("keep_best", "train_epoch"):  # the second start ends before another step

        def dies(*_: Any) -> None:
            raise KilledError

        with monkeypatch.context() as patched, pytest.raises(KilledError):
            patched.setattr(train, name, dies)
            run(shards, folder)
        assert last_state(folder)["progress"]["evaluated"] == 1
        assert (folder / "best").exists() == (folder / "threshold.json").exists() == (name == "train_epoch")
    assert "epoch: 1\n" in (folder / "best" / "README.md").read_text() and json.loads((folder / "threshold.json").read_text())["epoch"] == 1
    run(shards, folder)
    assert_same_run(folder, quiet)
    for name in ("best/model.safetensors", "best/README.md", "threshold.json"):
        assert (folder / name).read_bytes() == (quiet / name).read_bytes()


def test_patience_that_grows_lets_a_run_go_on_that_had_ended(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--epochs", "3", "--lr", "1e-30", "--min-lr", "0")  # no epoch is better than the first
    with caplog.at_level("INFO"):
        folder = run(shards, tmp_path / "run", *flags, "--patience", "1")
    assert last_state(folder)["progress"]["trained"] == 2 and "--patience 1: no better auroc since epoch 1; the run ends" in caplog.text
    assert "best/ is of epoch 1 (val auroc 0." in caplog.text
    run(shards, folder, *flags, "--patience", "2")
    assert last_state(folder)["progress"]["trained"] == 3 and (folder / "done").exists()


@pytest.mark.parametrize("place", ["step", "validate", "test"])
def test_a_signal_anywhere_saves_ends_well_and_the_run_goes_on(
    shards: Path, quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        if place == "step":
            done = Journal.step

            def asked(self: Journal, *arguments: Any) -> None:
                done(self, *arguments)
                if self.progress.step == 7:
                    os.kill(os.getpid(), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGUSR1)

            patched.setattr(Journal, "step", asked)
        else:
            original = getattr(train, place)

            def asked_in(*arguments: Any) -> None:
                os.kill(os.getpid(), signal.SIGUSR2)
                original(*arguments)

            patched.setattr(train, place, asked_in)
        run(shards, folder, "--micro-batch", "4")
    assert not (folder / "done").exists() and "saved at step" in json.loads((folder / "stopped.json").read_text())["reason"]
    assert last_state(folder)["progress"]["step"] == {"step": 8, "validate": 10, "test": 20}[place]
    run(shards, folder)
    assert (folder / "done").exists() and not (folder / "stopped.json").exists()
    assert_same_run(folder, quiet)


def test_a_signal_to_one_of_two_ranks_saves_on_both_and_one_rank_goes_on(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--epochs", "4")  # what draws by rank is off: all ranks' losses are one rank's
    folder, alone = tmp_path / "run", run(shards, tmp_path / "alone", *flags)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *words(shards, folder, *flags)]
    ranks = [
        subprocess.Popen(command, env=os.environ | several | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    end_s = time.monotonic() + 90
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < end_s:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGUSR2)
    errors = [process.communicate(timeout=90)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    step = last_state(folder)["progress"]["step"]
    assert step < 40 and json.loads((folder / "stopped.json").read_text())["reason"] == f"SIGUSR2: asked to end; saved at step {step}"
    run(shards, folder, *flags)
    losses = [[line["train/loss"] for line in lines(one) if "train/loss" in line] for one in (folder, alone)]
    assert len(losses[1]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-4)  # sums in another order
    assert (folder / "certificate.json").read_bytes() == (alone / "certificate.json").read_bytes()
    assert certify(CertifyConfig(folder)) == 0
    capsys.readouterr()


def test_a_finished_run_keeps_no_optimiser_unless_asked_and_says_so_when_it_grows(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run(shards, tmp_path / "run", "--no-keep-optimizer", "--epochs", "1")
    assert "optimizer" not in last_state(folder) and len(list((folder / "checkpoints").iterdir())) == 1
    with caplog.at_level("INFO"):
        run(shards, folder, "--epochs", "2")
    assert "kept no state of the optimizer" in caplog.text and "optimizer" in last_state(folder)


def test_steps_that_are_not_finite_change_nothing_are_counted_and_in_the_end_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[int, torch.Tensor] = {}
    original = training.step.gradients
    calls = []

    def diverging(model: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        loss = original(model, *arguments)
        calls.append(1)
        weight = next(model.parameters())
        before[len(calls)] = weight.detach().clone()
        if len(calls) in (2, 3):
            weight.grad.fill_(float("nan"))  # type: ignore[union-attr]  # it has one
            return loss * float("nan")
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(train, "gradients", diverging)
        folder = run(shards, tmp_path / "run", "--epochs", "1", "--max-skipped", "2")
    assert torch.equal(before[2], before[3]) and torch.equal(before[3], before[4]) and not torch.equal(before[4], before[5])
    assert [line["train/skipped"] for line in lines(folder) if "train/skipped" in line] == [1, 2, 2, 2, 2]
    assert last_state(folder)["ema"]["updates"] == 8  # of ten steps
    calls.clear()
    with monkeypatch.context() as patched, pytest.raises(InputError, match=r"--max-skipped 1: 2 steps .* with the clips train/"):
        patched.setattr(train, "gradients", diverging)
        run(shards, tmp_path / "other", "--epochs", "1", "--max-skipped", "1")
