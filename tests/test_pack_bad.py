"""Snippets that cannot be used: counted over everything, named with reason and remedy, and packed once they are mended."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips.errors import InputError
from clips.format import unpack_index
from clips.manifest import read_manifest
from convert.merge import MergeConfig, merge
from convert.pack import PackConfig, pack
from convert.work import pack_shards
from tests.making import tell_tale_mask, tell_tale_video, write_home
from tests.packing import members_of, not_half_written, rewrite, snippets_of, spoil, spoil_pixels, stamps, tree, use_threads

COUNTS = {"train": {"nongesture": 5, "gesture": 3}, "val": {"nongesture": 1, "gesture": 1}}
SMALL = 0.06  # MiB: a shard of 8x32x32 holds two clips as zstd


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return write_home(tmp_path, COUNTS)


@pytest.fixture
def packing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    use_threads(monkeypatch)
    return PackConfig(home, tmp_path / "out", codec="zstd", shard_mib=SMALL, workers=2)


def relative(home: Path, path: Path) -> str:
    return path.relative_to(home).as_posix()


def too_many(config: PackConfig | MergeConfig) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(InputError) as error:
        pack(config) if isinstance(config, PackConfig) else merge(config)
    assert not_half_written(config.output)
    return str(error.value).splitlines()


def bad_lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "bad.jsonl").read_text(encoding="utf-8").splitlines()]


def shards_with(output: Path, home: Path, paths: list[Path]) -> set[str]:
    """Files of the shards whose index names one of the snippets, in its clips or among the bad."""
    wanted = {relative(home, path) for path in paths}
    found = set()
    for path in output.rglob("*.index.mp"):
        index = unpack_index(path.read_bytes())
        named = {f"{entry.facts.key}.npz" for entry in index.clips} | {one["path"] for one in index.bad}
        if wanted & named:
            found |= {relative(output, path), relative(output, path).replace(".index.mp", ".tar")}
    return found


def changed(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_bad_values_are_all_listed_and_their_shards_have_holes(packing: PackConfig) -> None:
    paths = snippets_of(packing.dataset_home)
    spoil(paths[0])
    spoil(paths[4])
    spoil_pixels(paths[7])
    lines = too_many(packing)
    named = [line.split(": ")[0].strip() for line in lines[1:-1]]
    assert lines[0] == "3 of 10 snippets cannot be used:"
    assert named == [relative(packing.dataset_home, path) for path in (paths[0], paths[4], paths[7])]
    assert "holds 2; expected 0 and 1 alone" in lines[1] and lines[-1].startswith("Mend these files, or allow them with --max-bad-clips 3, then run the same")
    there = {name.removesuffix(".cls") for name in members_of(packing.output) if name.endswith(".cls")}
    assert there == {relative(packing.dataset_home, path).removesuffix(".npz") for path in paths if relative(packing.dataset_home, path) not in named}


def test_a_bad_snippet_is_named_in_its_index_in_bad_jsonl_and_in_the_manifest(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    path = snippets_of(packing.dataset_home / "train")[2]
    spoil(path)
    manifest = pack(replace(packing, max_bad_clips=1))
    assert manifest is not None and sum(split.num_clips for split in manifest.splits.values()) == 9
    reason = "array keypoints: the mask holds 2; expected 0 and 1 alone"
    told = {"path": relative(packing.dataset_home, path), "reason": reason}
    assert manifest.splits["train"].bad == (told,) and manifest.splits["val"].bad == ()
    (index,) = [index for index in map(unpack_index, (p.read_bytes() for p in packing.output.rglob("*.index.mp"))) if index.bad]
    assert index.bad == (told,)
    (line,) = bad_lines(packing.output)
    assert line == told | {"split": "train", "shard": index.shard, "remedy": line["remedy"]} and "--max-bad-clips" in line["remedy"]
    assert "train: 1 bad snippet left out, see bad.jsonl" in caplog.text


def test_the_budget_is_over_all_splits_shards_and_shares(packing: PackConfig) -> None:
    for split in ("train", "val"):
        spoil(snippets_of(packing.dataset_home / split)[0])
    shares = [replace(packing, task=task, tasks=5, max_bad_clips=1) for task in range(5)]
    for share in shares[:4]:  # the shards of train, one each
        pack(share)
    assert too_many(shares[4])[0] == "2 of 10 snippets cannot be used:"
    assert too_many(MergeConfig(packing.output, max_bad_clips=1))[0] == "2 of 10 snippets cannot be used:"
    assert len(bad_lines(packing.output)) == 2
    assert len([bad for split in merge(MergeConfig(packing.output, max_bad_clips=2)).splits.values() for bad in split.bad]) == 2


def test_a_split_added_later_forgets_no_bad_snippet_of_the_others(packing: PackConfig) -> None:
    spoil(snippets_of(packing.dataset_home / "train")[0])
    pack(replace(packing, splits=("train",), max_bad_clips=1))
    with pytest.raises(InputError, match="1 of 10 snippets cannot be used"):
        pack(replace(packing, splits=("val",)))
    pack(replace(packing, splits=("val",), max_bad_clips=1))
    assert len(bad_lines(packing.output)) == 1 and len(read_manifest(packing.output).splits["train"].bad) == 1


def test_all_other_shards_keep_their_bytes(packing: PackConfig, tmp_path: Path) -> None:
    path = snippets_of(packing.dataset_home)[3]
    whole = path.read_bytes()
    bent = bytearray(whole)
    bent[len(whole) // 2] ^= 0xFF  # the same size, so the same plan
    path.write_bytes(bent)
    pack(replace(packing, max_bad_clips=1))
    path.write_bytes(whole)
    pack(replace(packing, output=tmp_path / "quiet"))
    concerned = shards_with(packing.output, packing.dataset_home, [path])
    holed, quiet = tree(packing.output), tree(tmp_path / "quiet")
    assert {name for name in holed.keys() | quiet.keys() if holed.get(name) != quiet.get(name)} == concerned | {"bad.jsonl", "manifest.json"}
    pack(packing)  # mended: the very bytes of a quiet run
    assert tree(packing.output) == quiet


@pytest.mark.parametrize("size", ["the same size", "another size"])
def test_mending_a_file_writes_only_its_shard_anew_and_then_nothing(size: str, packing: PackConfig) -> None:
    paths = snippets_of(packing.dataset_home)
    for path in (paths[0], paths[9]):
        spoil(path)
    pack(replace(packing, max_bad_clips=2))
    before = stamps(packing.output)
    if size == "another size":
        rewrite(paths[0], video=tell_tale_video(99, 8, 32, 32), keypoints=tell_tale_mask(99, 8, 32, 32, 3))
    else:
        good, spoilt = tell_tale_mask(0, 8, 32, 32), paths[0].stat().st_size
        for points in range(1, 9):  # search for a mask whose file has the very size of the spoilt one
            rewrite(paths[0], keypoints=tell_tale_mask(points, 8, 32, 32))
            if paths[0].stat().st_size == spoilt:
                break
        else:
            np.savez_compressed(paths[0], video=tell_tale_video(0, 8, 32, 32), keypoints=good)
    assert too_many_by_one(packing)
    pack(replace(packing, max_bad_clips=1))
    concerned = shards_with(packing.output, packing.dataset_home, [paths[0]])
    after = stamps(packing.output)
    assert changed(before, after) == concerned | {"bad.jsonl", "manifest.json"}
    assert [line["path"] for line in bad_lines(packing.output)] == [relative(packing.dataset_home, paths[9])]
    pack(replace(packing, max_bad_clips=1))
    assert stamps(packing.output) == after


def too_many_by_one(packing: PackConfig) -> bool:
    """Whether the refusal names just one snippet."""
    with pytest.raises(InputError, match="1 of 10 snippets cannot be used"):
        pack(packing)
    return True


def test_a_mended_file_may_be_packed_by_another_share_and_after_a_stop_between_two_shards(packing: PackConfig) -> None:
    paths = snippets_of(packing.dataset_home)
    for path in (paths[0], paths[9]):
        spoil(path)
    shares = [replace(packing, task=task, tasks=5, max_bad_clips=2) for task in range(5)]
    for share in shares:
        pack(share)
    for number, path in enumerate((paths[0], paths[9])):
        rewrite(path, video=tell_tale_video(70 + number, 8, 32, 32), keypoints=tell_tale_mask(70 + number, 8, 32, 32, 3))
    for share in shares * 2:
        pack(replace(share, max_bad_clips=2))
    manifest = merge(MergeConfig(packing.output))
    assert sum(split.num_clips for split in manifest.splits.values()) == 10
    before = stamps(packing.output)
    pack(packing)
    assert stamps(packing.output) == before and not (packing.output / "bad.jsonl").exists()


def test_raising_the_budget_writes_no_shard_anew(packing: PackConfig) -> None:
    spoil(snippets_of(packing.dataset_home)[5])
    too_many(packing)
    before = stamps(packing.output)
    pack(replace(packing, max_bad_clips=1))
    assert changed(before, stamps(packing.output)) == {"manifest.json"}


def test_a_bad_file_that_was_moved_away_stays_a_hole_that_counts(packing: PackConfig) -> None:
    path = snippets_of(packing.dataset_home)[5]
    spoil(path)
    too_many(packing)
    before = stamps(packing.output)
    path.unlink()
    assert too_many(packing)[0] == "1 of 10 snippets cannot be used:"
    pack(replace(packing, max_bad_clips=1))
    assert changed(before, stamps(packing.output)) == {"manifest.json"}


def test_a_good_file_that_was_moved_away_or_changed_is_another_plan(packing: PackConfig) -> None:
    spoil(snippets_of(packing.dataset_home)[5])
    too_many(packing)
    path = snippets_of(packing.dataset_home)[0]
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match="1 file added, removed or changed in size"):
        pack(replace(packing, max_bad_clips=1))
    path.write_bytes(whole + b"x")
    with pytest.raises(InputError, match="1 file added, removed or changed in size"):
        pack(replace(packing, max_bad_clips=1))


def test_bad_headers_are_bad_clips_when_they_are_allowed(packing: PackConfig) -> None:
    paths = snippets_of(packing.dataset_home)
    rewrite(paths[1], keypoints=tell_tale_mask(0, 7, 32, 32))  # a frame less than the video
    paths[4].write_bytes(paths[4].read_bytes()[:1000])
    with pytest.raises(InputError) as error:
        pack(replace(packing, max_bad_clips=1))
    assert str(error.value).startswith("2 of 10 snippets cannot be used:\n") and not packing.output.exists()
    manifest = pack(replace(packing, max_bad_clips=2))
    assert manifest is not None
    reasons = {line["path"]: line["reason"] for line in bad_lines(packing.output)}
    assert reasons.keys() == {relative(packing.dataset_home, path) for path in (paths[1], paths[4])}
    assert "'keypoints' is uint8 (7, 32, 32); expected (8, 32, 32) as the video" in reasons[relative(packing.dataset_home, paths[1])]
    assert "not a whole npz" in reasons[relative(packing.dataset_home, paths[4])]


def test_a_split_of_bad_snippets_alone_is_packed_and_looked_at_for_leaks(packing: PackConfig) -> None:
    for path in snippets_of(packing.dataset_home / "val"):
        spoil(path)
    manifest = pack(replace(packing, max_bad_clips=2, near_duplicates=True))
    assert manifest is not None and manifest.splits["val"].num_clips == 0 and len(manifest.splits["val"].bad) == 2


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_a_snippet_that_changes_between_plan_and_packing_is_bad(change: str, packing: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = snippets_of(packing.dataset_home)[6]
    copied = path.read_bytes()

    def late(*args: Any) -> Any:
        path.write_bytes(copied + b"more") if change == "grown" else path.unlink()
        return pack_shards(*args)

    monkeypatch.setattr("convert.pack.pack_shards", late)
    lines = too_many(packing)
    expected = f"changed since the pack was planned: {len(copied)} bytes then, {len(copied) + 4} now" if change == "grown" else "No such file"
    assert lines[0] == "1 of 10 snippets cannot be used:" and expected in lines[1]
    monkeypatch.setattr("convert.pack.pack_shards", pack_shards)
    path.write_bytes(copied)
    pack(packing)
    after = tree(packing.output)
    shutil.rmtree(packing.output)
    pack(packing)
    assert tree(packing.output) == after


def test_constant_zero_and_padded_frames_are_counted_and_reported(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    paths = snippets_of(packing.dataset_home / "train")
    one_colour, all_zero, padded, dark_inside = (tell_tale_video(number, 8, 32, 32) for number in range(4))
    one_colour[2:5] = (9, 200, 30)
    all_zero[:] = 0
    padded[5:] = 0
    dark_inside[3] = 0
    for path, video in zip(paths, (one_colour, all_zero, padded, dark_inside), strict=False):
        rewrite(path, video=video)
    caplog.set_level(logging.INFO)
    pack(packing)
    found: dict[str, tuple[int, int]] = {}
    for path in packing.output.rglob("*.index.mp"):
        found |= {entry.facts.key: (entry.frames_constant, entry.facts.frames_valid) for entry in unpack_index(path.read_bytes()).clips}
    keys = [relative(packing.dataset_home, path).removesuffix(".npz") for path in paths]
    assert [found[key] for key in keys] == [(3, 8), (8, 8), (0, 5), (1, 8)] + [(0, 8)] * 4
    assert "train: 1 clip with zero frames at the end, which are not sampled" in caplog.text
    assert "train: 3 clips with frames of a single colour, '" in caplog.text
