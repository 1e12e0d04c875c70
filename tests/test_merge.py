"""Shares and merge: any number of tasks and workers in any order gives the same bytes, and what does not belong is named."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clips.environment import Array
from clips.errors import InputError
from clips.manifest import read_manifest
from convert.merge import MergeConfig, merge
from convert.pack import PackConfig, pack, share
from tests.making import write_home
from tests.packing import convert, refused, rewrite, snippets_of, tree, use_threads

COUNTS = {"train": {"nongesture": 9, "gesture": 6}, "val": {"nongesture": 2, "gesture": 2}}


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    """Ten shards of two clips."""
    use_threads(monkeypatch)
    return PackConfig(write_home(tmp_path, COUNTS, padded_every=4), tmp_path / "out", codec="zstd", shard_mib=0.06, workers=2)


def pack_shares(config: PackConfig, tasks: int, order: list[int] | None = None) -> None:
    for task in order if order is not None else range(tasks):
        pack(replace(config, task=task, tasks=tasks))


def merge_says(folder: Path) -> str:
    """The lines of the refusal; no manifest and no claim is left."""
    with pytest.raises(InputError) as error:
        merge(MergeConfig(folder))
    assert not (folder / "manifest.json").exists() and not list(folder.rglob(".*"))
    return str(error.value)


# --- the same bytes


@pytest.mark.slow
def test_one_and_seven_tasks_with_one_and_two_workers_make_the_same_bytes(tmp_path: Path) -> None:
    """Real processes, as users have them."""
    home = write_home(tmp_path, {"train": {"a": 5, "b": 3}}, frames=4)
    for tasks in (1, 7):
        for workers in (1, 2):
            config = PackConfig(home, tmp_path / f"{tasks}x{workers}", codec="zstd", shard_mib=0.03, workers=workers)
            pack_shares(config, tasks)
            if tasks > 1:
                assert not (config.output / "manifest.json").exists()
                merge(MergeConfig(config.output))
    first = tree(tmp_path / "1x1")
    assert sum(name.endswith(".tar") for name in first) > 3 and "manifest.json" in first
    assert first == tree(tmp_path / "1x2") == tree(tmp_path / "7x1") == tree(tmp_path / "7x2")


@pytest.mark.parametrize("tasks", [2, 7, 10, 30])
def test_any_number_of_tasks_in_any_order_makes_the_same_bytes(tasks: int, packing: PackConfig, tmp_path: Path) -> None:
    manifest = pack(packing)
    order = list(range(tasks))
    random.Random(tasks).shuffle(order)
    pack_shares(replace(packing, output=tmp_path / "shares"), tasks, [*order, order[0]])
    assert merge(MergeConfig(tmp_path / "shares")) == manifest
    assert tree(tmp_path / "shares") == tree(packing.output)


def test_merging_again_changes_nothing(packing: PackConfig) -> None:
    pack_shares(packing, 3)
    first = merge(MergeConfig(packing.output))
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in packing.output.rglob("*")}
    assert merge(MergeConfig(packing.output)) == first
    files = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in packing.output.rglob("*") if path.is_file()}
    assert files.items() <= before.items()


def test_a_share_packs_its_shards_and_no_other(packing: PackConfig) -> None:
    assert pack(replace(packing, task=1, tasks=4)) is None
    assert sorted(path.name for path in packing.output.rglob("*.tar")) == ["train-000001.tar", "train-000005.tar", "val-000001.tar"]


def test_the_command_packs_shares_and_merges_them(packing: PackConfig, tmp_path: Path) -> None:
    words = ("pack", "--dataset-home", packing.dataset_home, "--output", tmp_path / "by", "--codec", "zstd", "--tasks", "1", "--task", "0")
    assert convert(*words, "--workers", "1", "--splits", "val").returncode == 0
    (tmp_path / "by/manifest.json").unlink()
    merged = convert("merge", tmp_path / "by")
    assert merged.returncode == 0 and "val: 4 clips (2 nongesture, 2 gesture)" in merged.stderr, merged.stderr
    shutil.rmtree(tmp_path / "by/val")
    refusal = convert("merge", tmp_path / "by")
    assert refusal.returncode == 2 and refusal.stderr.startswith(f"error: {tmp_path / 'by'}: no plan.json below it")


# --- which share


def config(**flags: int | None) -> PackConfig:
    return PackConfig(Path("home"), Path("out"), **flags)  # type: ignore[arg-type]  # task and tasks alone


@pytest.mark.parametrize(
    ("flags", "array", "expected"),
    [
        ({}, None, (0, 1)),
        ({"task": 2, "tasks": 5}, None, (2, 5)),
        ({"task": 0, "tasks": 1}, None, (0, 1)),
        ({}, Array(element=3, count=7, lowest=0, highest=6), (3, 7)),
        ({}, Array(element=0, count=1, lowest=0, highest=0), (0, 1)),
        ({"tasks": 7}, Array(element=5, count=2, lowest=3, highest=5), (5, 7)),  # a repair array
        ({"task": 1}, Array(element=3, count=7, lowest=0, highest=6), (1, 7)),
        ({"task": 1, "tasks": 2}, Array(element=3, count=7, lowest=0, highest=6), (1, 2)),
    ],
)
def test_a_share_is_as_asked_or_the_job_arrays(flags: dict[str, int], array: Array | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert share(config(**flags), array) == expected
    if array is not None:
        for name, value in (("ID", array.element), ("COUNT", array.count), ("MIN", array.lowest), ("MAX", array.highest)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert share(config(**flags)) == expected


@pytest.mark.parametrize(
    ("flags", "array", "text"),
    [
        ({}, Array(5, 2, 3, 5), "--tasks: missing; this job array has 2 elements, 3 … 5, so the number of shares cannot be told from it. Give --tasks"),
        ({}, Array(0, 3, 0, 4), "--tasks: missing; this job array has 3 elements, 0 … 4"),
        ({}, Array(1, 7, 1, 7), "--tasks: missing; this job array has 7 elements, 1 … 7"),
        ({"task": 3}, None, "--tasks: missing; --task 3 is one share of how many?"),
        ({"tasks": 3}, None, "--task: missing; expected 0 … 2"),
        ({"task": 3, "tasks": 3}, None, "--task 3: expected 0 … 2 for --tasks 3."),
        ({"task": -1, "tasks": 3}, None, "--task -1: expected 0 … 2 for --tasks 3."),
        ({"tasks": 2}, Array(5, 2, 3, 5), "--task 5: expected 0 … 1 for --tasks 2."),
    ],
)
def test_a_share_that_cannot_be_told_is_an_error_that_names_the_flag(flags: dict[str, int], array: Array | None, text: str) -> None:
    with pytest.raises(InputError) as error:
        share(config(**flags), array)
    assert str(error.value).startswith(text)


# --- what merge refuses


def test_a_gap_is_named_with_what_to_do(packing: PackConfig) -> None:
    pack_shares(packing, 5, [0, 1, 3, 4])
    lines = merge_says(packing.output).splitlines()
    assert lines[0] == f"{packing.output}: not whole:" and len(lines) == 3
    assert all(": missing. Pack its share again (python -m convert pack with the same --task and --tasks)." in line for line in lines[1:])
    assert [name in line for name, line in zip(("train-000002.index.mp", "train-000007.index.mp"), lines[1:], strict=True)] == [True, True]
    pack_shares(packing, 5, [2])
    merge(MergeConfig(packing.output))


def test_all_that_is_wrong_is_named_at_once(packing: PackConfig) -> None:
    pack_shares(packing, 2)
    (packing.output / "train/train-000001.tar").unlink()
    (packing.output / "train/train-000002.index.mp").write_bytes(b"\x80")
    os.truncate(packing.output / "val/val-000000.tar", 512)
    shutil.copy(packing.output / "train/train-000003.tar", packing.output / "train/copy.tar")
    lines = merge_says(packing.output).splitlines()
    parts = ["train-000001.tar: missing.", "train-000002.index.mp: an index of format version None", "train/copy.tar: no shard of this plan"]
    parts += ["val-000000.tar: is not the tar that its index tells of"]
    assert len(lines) == 5 and all(part in line for part, line in zip(parts, lines[1:], strict=True))


@pytest.mark.parametrize("name", ["train-000099", "train-0000001", "val-000000"])
def test_a_copied_shard_under_another_name_is_named(name: str, packing: PackConfig) -> None:
    pack_shares(packing, 2)
    for suffix in (".tar", ".index.mp"):
        shutil.copy(packing.output / f"train/train-000001{suffix}", packing.output / f"train/{name}{suffix}")
    text = merge_says(packing.output)
    assert f"train/{name}.tar: no shard of this plan. Remove it." in text and f"train/{name}.index.mp: no shard of this plan" in text


def test_a_shard_in_the_place_of_another_is_named(packing: PackConfig) -> None:
    pack_shares(packing, 2)
    for suffix in (".tar", ".index.mp"):
        shutil.copy(packing.output / f"train/train-000001{suffix}", packing.output / f"train/train-000002{suffix}")
    assert "train-000002.index.mp: is of shard train-000001. Remove it and train-000002.tar, then pack its share again." in merge_says(packing.output)


def test_a_strangers_shard_with_the_right_name_is_named(packing: PackConfig, tmp_path: Path) -> None:
    pack_shares(packing, 2)
    pack(replace(packing, output=tmp_path / "other", level=3))
    for suffix in (".tar", ".index.mp"):
        shutil.copy(tmp_path / f"other/train/train-000001{suffix}", packing.output / f"train/train-000001{suffix}")
    assert "train-000001.index.mp: is of shard train-000001 of another plan. Remove it" in merge_says(packing.output)


@pytest.mark.parametrize("place", [0, 600, 5000, -1])
def test_a_damaged_tar_is_named(place: int, packing: PackConfig) -> None:
    pack_shares(packing, 2)
    path = packing.output / "train/train-000004.tar"
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)
    assert f"{path}: is not the tar that its index tells of. Remove both, then pack its share again." in merge_says(packing.output)
    path.unlink()
    pack_shares(packing, 2)
    merge(MergeConfig(packing.output))


def test_shards_whose_plan_is_gone_are_not_forgotten(packing: PackConfig) -> None:
    pack_shares(packing, 2)
    (packing.output / "val/plan.json").unlink()
    assert f"{packing.output / 'val'}: holds shards without plan.json." in merge_says(packing.output)


def test_splits_of_different_settings_are_not_merged(packing: PackConfig) -> None:
    pack(replace(packing, splits=("train",), task=0, tasks=2))
    pack(replace(packing, splits=("val",), task=0, tasks=2, level=3))
    assert "train and val were packed with different settings" in merge_says(packing.output)


@pytest.mark.parametrize("text", ["", "{", '{"plan_id": "x", "inputs": {}}'])
def test_a_damaged_plan_is_one_clear_line(text: str, packing: PackConfig) -> None:
    pack_shares(packing, 2)
    (packing.output / "train/plan.json").write_text(text)
    assert f"{packing.output / 'train/plan.json'}: not readable as a plan (" in merge_says(packing.output)


def test_a_plan_that_does_not_tell_the_homes_folder_is_one_clear_line(packing: PackConfig) -> None:
    pack_shares(packing, 2)
    path = packing.output / "train/plan.json"
    path.write_text(path.read_text().replace('"folder"', '"fodder"'))
    assert merge_says(packing.output) == f"{path}: does not tell the home's folder. Restore it, or take another --output."


@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_snippets_that_come_go_or_change_between_two_tasks_are_an_error(change: str, packing: PackConfig) -> None:
    pack(replace(packing, task=0, tasks=2))
    before = tree(packing.output)
    path = snippets_of(packing.dataset_home / "train")[3]
    if change == "added":
        shutil.copy(path, path.with_name("999999999_late.npz"))
    elif change == "removed":
        path.unlink()
    else:
        with open(path, "ab") as file:
            file.write(b"more")
    text = refused(replace(packing, task=1, tasks=2))
    assert "train is in use by another plan: 1 file added, removed or changed in size, train/gesture/" in text
    assert tree(packing.output) == before


def test_near_duplicates_asked_for_once_are_looked_for_again(packing: PackConfig) -> None:
    pack(replace(packing, splits=("train",)))
    assert read_manifest(packing.output).leaks.near is None
    train = snippets_of(packing.dataset_home / "train")[0]
    with_copy = snippets_of(packing.dataset_home / "val")[0]
    import numpy as np

    with np.load(train) as arrays:
        video = arrays["video"].copy()
    video[0, 0, 0] ^= 1
    rewrite(with_copy, video=video)
    assert merge(MergeConfig(packing.output, near_duplicates=True)).leaks.near == []
    manifest = pack(packing)
    assert manifest is not None and manifest.leaks.near is not None
    keys = [path.relative_to(packing.dataset_home).as_posix().removesuffix(".npz") for path in (train, with_copy)]
    assert keys in manifest.leaks.near
