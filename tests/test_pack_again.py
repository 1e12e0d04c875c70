"""Packing again: the same bytes each time, and only what is missing is done."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips.errors import InputError
from clips.files import whole_file
from clips.manifest import read_manifest
from convert.pack import PackConfig, pack
from tests.packing import SMALL, convert, pack_all, rewrite, snippets_of, tree


def test_one_worker_and_two_make_the_same_bytes(home: Path, tmp_path: Path) -> None:
    """Real processes, as users have them; also more workers than shards, which become threads."""
    one = PackConfig(home, tmp_path / "one", shard_mib=SMALL, workers=1)
    pack(one)
    pack(replace(one, output=tmp_path / "two", workers=2))
    pack(replace(one, output=tmp_path / "threads", workers=2, splits=("val",), shard_mib=100))
    pack(replace(one, output=tmp_path / "thread", workers=1, splits=("val",), shard_mib=100))
    assert len(list((tmp_path / "one").rglob("*.tar"))) == 3
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert tree(tmp_path / "thread") == tree(tmp_path / "threads")


def test_a_second_run_changes_no_byte_and_no_time(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    first = pack_all(packing)
    before, times = tree(packing.output), {path: path.stat().st_mtime_ns for path in packing.output.rglob("*")}
    caplog.set_level(logging.INFO)
    assert pack(packing) == first
    assert "packing 0 shards (" in caplog.text
    assert tree(packing.output) == before
    assert {path: path.stat().st_mtime_ns for path in packing.output.rglob("*")} == times


def test_of_runs_at_once_one_packs_and_the_others_say_who_does(packing: PackConfig, tmp_path: Path) -> None:
    pack(packing)
    together = replace(packing, output=tmp_path / "together")
    with ThreadPoolExecutor(3) as pool:
        ends = [future.exception() for future in [pool.submit(pack, together) for _ in range(3)]]
    assert None in ends
    assert all(f"process {os.getpid()} on " in str(end) and " packs this share" in str(end) for end in ends if end is not None)
    assert tree(tmp_path / "together") == tree(packing.output)


@pytest.mark.parametrize("what", ["train/train-000001.tar", "train/train-000001.index.mp", "manifest.json", "train/plan.json", "cut", "all of val"])
def test_what_is_missing_is_made_again_with_the_same_bytes(what: str, packing: PackConfig) -> None:
    pack(packing)
    before = tree(packing.output)
    kept = packing.output / "train/train-000000.tar"
    kept_time = kept.stat().st_mtime_ns
    if what == "cut":
        os.truncate(packing.output / "train/train-000001.tar", 1000)
    elif what == "all of val":
        shutil.rmtree(packing.output / "val")
    else:
        (packing.output / what).unlink()
    pack(packing)
    assert tree(packing.output) == before and kept.stat().st_mtime_ns == kept_time


def test_a_split_may_be_added_later_with_the_same_settings(packing: PackConfig, tmp_path: Path) -> None:
    pack(replace(packing, splits=("train",)))
    alone = tree(packing.output)
    assert list(read_manifest(packing.output).splits) == ["train"]
    pack(replace(packing, splits=("val",)))
    assert set(read_manifest(packing.output).splits) == {"train", "val"}
    after = tree(packing.output)
    assert {name: after[name] for name in alone if name != "manifest.json"} == {name: alone[name] for name in alone if name != "manifest.json"}
    pack(replace(packing, output=tmp_path / "together"))
    assert tree(tmp_path / "together") == after
    with pytest.raises(InputError, match="level"):
        pack(replace(packing, splits=("val",), level=2))
    assert tree(packing.output) == after


def test_a_temporary_file_of_a_killed_run_is_neither_a_shard_nor_in_the_way(packing: PackConfig) -> None:
    pack(packing)
    before = tree(packing.output)
    (packing.output / "train/train-000000.tar").unlink()
    stray = packing.output / "train/.train-000000.tar.host.1.abcd.tmp"
    stray.write_bytes(b"half")
    pack(packing)
    stray.unlink()
    assert tree(packing.output) == before


def test_each_flag_that_changes_bytes_changes_the_plan(packing: PackConfig) -> None:
    rewrite(snippets_of(packing.dataset_home / "val")[0], extra=np.arange(3))
    base = replace(packing, codec="jpeg", extras="drop", splits=("val",))
    changes: list[dict[str, Any]] = [
        {},
        {"codec": "zstd"},
        {"quality": 80},
        {"store_size": 16},
        {"shard_mib": 100.0},
        {"keypoints": "optional"},
        {"keypoints": "none"},
        {"extras": "keep"},
        {"classes": ("gesture", "nongesture")},
        {"source_pattern": r"^(?P<source>.+)$"},
    ]
    plan_ids = set()
    for number, change in enumerate(changes):
        manifest = pack_all(replace(base, output=packing.output / str(number), **change))
        plan_ids.add(manifest.splits["val"].plan_id)
    assert len(plan_ids) == len(changes)


def test_the_command_packs_and_verifies(home: Path, tmp_path: Path) -> None:
    packed = convert("pack", "--dataset-home", home, "--output", tmp_path / "out", "--codec", "zstd", "--splits", "val", "--workers", "1")
    assert packed.returncode == 0, packed.stderr
    assert "val: 2 clips (1 nongesture, 1 gesture) in 1 shard," in packed.stderr
    verified = convert("verify", tmp_path / "out", "--dataset-home", home, "--workers", "1")
    assert verified.returncode == 0 and verified.stdout.splitlines()[-1] == "bit-exact: npz can be rebuilt"


def test_a_file_gets_its_name_once_all_of_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"old")
    synced: list[tuple[int, int]] = []  # inode and bytes
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with whole_file(path) as file:
        file.write(b"new" * 1000)
        assert path.read_bytes() == b"old"
        inode = os.fstat(file.fileno()).st_ino
    assert path.read_bytes() == b"new" * 1000
    assert path.stat().st_ino == inode  # renamed, not copied
    assert synced[0] == (inode, 3000) and synced[1][0] == tmp_path.stat().st_ino
