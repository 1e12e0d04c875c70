"""What a run is fed: certified over restarts and ranks, balanced, with bad clips counted, staged, decoded beside, on two and three ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from clips.errors import ClipError, InputError
from clips.manifest import index_path, read_index, read_manifest, tar_path
from convert.pack import PackConfig, pack
from loaders.certify import CertifyConfig, certify
from loaders.shards import ShardSource
from loaders.source import ChooseFrames, Fetched
from tests.making import write_home
from training.distributed import Group
from training.run_folder import RunFolder

COUNTS = {"train": {"nongesture": 9, "gesture": 4}, "val": {"nongesture": 1, "gesture": 1}, "test": {"nongesture": 1, "gesture": 1}}
ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_home(tmp_path_factory.mktemp("npz"), COUNTS, frames=17, height=72, width=72)
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1, shard_mib=0.5))
    return output


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


def words(home: Path, folder: Path, *flags: str) -> list[str]:
    kept = ["--epochs", "2", "--model-name", "videomae-tiny", "--batch-size", "4", "--log-every", "1", "--device", "cpu", "--threads", "1", "--keep-optimizer"]
    return ["--dataset-home", str(home), "--logger-folder", str(folder), *kept, *flags]


def run(home: Path, folder: Path, *flags: str) -> Path:
    train.train(train.parse(words(home, folder, *flags)), Group(0, 1, 0, torch.device("cpu"), "single"), RunFolder(folder))
    return folder


def lines(folder: Path, name: str) -> list[Any]:
    return [line[name] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if name in line]


def on_ranks(world_size: int, arguments: list[str], **changes: str) -> list[subprocess.CompletedProcess[str]]:
    """train.py as torchrun would start it, each rank a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | several | {"OMP_NUM_THREADS": "1"} | changes
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    done = []
    for process in ranks:
        try:
            out, error = process.communicate(timeout=120)
        finally:
            process.kill()
        done.append(subprocess.CompletedProcess(command, process.returncode, out, error))
    return done


def damage(home: Path, number: int, split: str = "train") -> str:
    """Flips a byte in every frame of the split's clip of that number by sorted key; gives its key."""
    found = []
    for shard in read_manifest(home).splits[split].shards:
        found += [(entry, tar_path(home, split, shard.name)) for entry in read_index(home, split, shard).clips]
    entry, path = sorted(found, key=lambda pair: pair[0].facts.key)[number]
    blob = bytearray(path.read_bytes())
    for offset in entry.frames["offset"].tolist():
        blob[offset + 9] ^= 1
    path.write_bytes(blob)
    return entry.facts.key


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """A reader that gives the clip after the one of that number instead of it."""
    fetch = ShardSource.fetch

    def wrong(self: ShardSource, asked: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        return fetch(self, asked + (asked == number), choose, with_points)

    ShardSource.fetch = wrong  # type: ignore[method-assign,assignment]  # for a while
    try:
        yield
    finally:
        ShardSource.fetch = fetch  # type: ignore[method-assign]


def test_a_run_certifies_every_clip_over_a_restart(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(shards, tmp_path / "run", "--epochs", "1")
    run(shards, folder, "--epochs", "3")
    assert certify(CertifyConfig(folder)) == 0
    assert [record["clips"] for record in json.loads((folder / "certificate.json").read_text())["epochs"]] == [12, 12, 12]
    capsys.readouterr()


def test_a_reader_that_gives_the_neighbouring_clip_is_found_out(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with neighbours(5):
        folder = run(shards, tmp_path / "run")
    assert certify(CertifyConfig(folder)) == 1
    assert "epoch 0" in capsys.readouterr().out


def test_balanced_epochs_report_the_clips_that_came(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(shards, tmp_path / "run", "--balance")
    assert lines(folder, "epoch/clips") == [{"nongesture": 4, "gesture": 4}] * 2
    assert certify(CertifyConfig(folder)) == 0
    with pytest.raises(InputError, match="--balance was True, now False"):
        run(shards, folder)
    capsys.readouterr()


def test_a_class_without_clips_cannot_be_balanced(tmp_path: Path) -> None:
    home = write_home(tmp_path, {"train": {"nongesture": 5}, "val": {"nongesture": 1, "gesture": 1}}, frames=17, height=72, width=72)
    with pytest.raises(InputError, match="--balance: no clips of gesture"):
        run(home, tmp_path / "run", "--balance")


def test_a_bad_clip_ends_the_run_and_is_named(own: Path, tmp_path: Path) -> None:
    key = damage(own, 2)
    with pytest.raises(ClipError, match=rf"{own}.*\.tar: clip '{key}', member frames\.mp at offset \d+: frame \d+ has another crc32"):
        run(own, tmp_path / "run", "--batch-size", "13")


def test_bad_clips_within_the_budget_are_counted_named_and_certified(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {damage(own, 2), damage(own, 7)}
    with caplog.at_level("WARNING"):
        folder = run(own, tmp_path / "run", "--batch-size", "13", "--max-bad-clips", "2")
    assert lines(folder, "epoch/bad_clips") == [2, 2] and all(caplog.text.count(f"'{key}'") == 2 for key in keys)
    assert {key for _, key in json.loads((folder / "certificate.json").read_text())["epochs"][1]["bad"]} == keys
    assert certify(CertifyConfig(folder)) == 0 and all(key in capsys.readouterr().out for key in sorted(keys)[:1])


def test_bad_clips_do_not_lower_the_logged_loss(shards: Path, own: Path, tmp_path: Path) -> None:
    damage(own, 2), damage(own, 7)
    whole, less = (
        run(home, tmp_path / home.parent.name / "run", "--batch-size", "13", "--epochs", "1", "--max-bad-clips", "2", "--head-init-scale", "1e-9")
        for home in (shards, own)
    )
    assert lines(less, "train/loss") == pytest.approx(lines(whole, "train/loss"), rel=1e-5)  # every clip's is log 2 at the start


def test_more_bad_clips_than_the_budget_end_the_run(own: Path, tmp_path: Path) -> None:
    damage(own, 2), damage(own, 7)
    with pytest.raises(InputError, match="--max-bad-clips allows 1"):
        run(own, tmp_path / "run", "--batch-size", "13", "--max-bad-clips", "1")


def test_a_bad_clip_of_val_is_left_out_listed_and_counted(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = damage(own, 1, "val")
    with caplog.at_level("WARNING"):
        folder = run(own, tmp_path / "run", "--max-bad-clips", "1")
    assert lines(folder, "val/unread") == [1, 1] and sum(sum(row) for row in lines(folder, "val/confusion")[0]) == 1
    assert key in caplog.text


def test_a_bad_clip_of_test_has_no_probabilities(own: Path, tmp_path: Path) -> None:
    key = damage(own, 0, "test")
    folder = run(own, tmp_path / "run", "--max-bad-clips", "1", "--epochs", "1")
    rows = (folder / "predictions-test.csv").read_text().splitlines()
    assert [",,," in row for row in rows[1:]] == [key in row for row in rows[1:]] and sum(key in row for row in rows) == 1


def test_staged_shards_and_a_process_beside_train_the_same(shards: Path, tmp_path: Path) -> None:
    quiet = run(shards, tmp_path / "quiet", "--epochs", "1")
    other = run(shards, tmp_path / "other", "--epochs", "1", "--stage-dir", str(tmp_path / "stage"), "--decode-in", "process", "--look-ahead", "0")
    assert lines(other, "train/loss") == lines(quiet, "train/loss")
    assert (quiet / "certificate.json").read_bytes() == (other / "certificate.json").read_bytes()
    run(shards, other, "--stage-dir", str(tmp_path / "elsewhere"), "--decode-in", "threads")  # these may change between starts


def test_two_and_three_ranks_over_uneven_shards_are_fed_what_one_is(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Thirteen clips in shards of several sizes: one rank, then two, then three continue one run. Of the two clips of val one rank of three has none."""
    sizes = [shard.clips for shard in read_manifest(shards).splits["train"].shards]
    assert len(set(sizes)) > 1
    alone = run(shards, tmp_path / "alone", "--batch-size", "6", "--epochs", "3")
    folder = run(shards, tmp_path / "run", "--batch-size", "6", "--epochs", "1")
    for epochs, world_size in ((2, 2), (3, 3)):
        done = on_ranks(world_size, words(shards, folder, "--batch-size", "6", "--epochs", str(epochs)))
        assert [one.returncode for one in done] == [0] * world_size, done[0].stderr + done[1].stderr
    assert (alone / "certificate.json").read_bytes() == (folder / "certificate.json").read_bytes()
    assert lines(folder, "train/loss") == pytest.approx(lines(alone, "train/loss"), rel=1e-4)  # sums in another order
    assert certify(CertifyConfig(folder)) == 0
    capsys.readouterr()


def test_a_bad_clip_on_one_rank_ends_all_with_one_line_each(own: Path, tmp_path: Path) -> None:
    key = damage(own, 2)
    done = on_ranks(2, words(own, tmp_path / "run", "--batch-size", "12"))
    assert [one.returncode for one in done] == [2, 2]
    assert sum(f"clip '{key}'" in one.stderr and "Traceback" not in one.stderr for one in done) == 2
    assert key in json.loads((tmp_path / "run" / "stopped.json").read_text())["reason"]


def test_a_killed_rank_ends_the_job(shards: Path, tmp_path: Path) -> None:
    killed = 1
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *words(shards, tmp_path / "run", "--epochs", "1000")]
    ranks = [
        subprocess.Popen(command, env=os.environ | several | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    end_s = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < end_s:
        time.sleep(0.05)
    ranks[killed].kill()
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert ranks[1 - killed].returncode == 2, errors
    assert f"rank {killed} of 2 ended" in errors[1 - killed] and "Traceback" not in errors[1 - killed]


def test_rank_without_world_size_is_one_line(shards: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {"RANK": "0"}
    command = [sys.executable, str(ROOT / "train.py"), *words(shards, tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "RANK is set but WORLD_SIZE is not" in done.stderr and "Traceback" not in done.stderr


def test_a_shard_that_is_exchanged_before_the_run_is_an_error_at_open(own: Path, tmp_path: Path) -> None:
    shard = read_manifest(own).splits["train"].shards[0]
    index_path(own, "train", shard.name).write_bytes(b"something else")
    with pytest.raises(ClipError, match=f"{shard.name}.index.mp: sha256 is not the manifest's"):
        run(own, tmp_path / "run")
