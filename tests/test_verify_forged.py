"""verify: shards whose checksums are right and whose content is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips.format import IndexEntry, ShardIndex, pack_json, pack_points
from tests.forging import Change, Forged, first, forge, forge_index, make_json_right, member, put, with_field, with_frames
from tests.making import tell_tale_mask, tell_tale_video
from tests.packing import tree
from tests.verifying import Check, assert_finds


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_frames(lambda frames: frames[:-1]), "frames are zstd 8x32x32x3"),
        (with_frames(lambda frames: [*frames, frames[0]]), "frames are zstd 8x32x32x3"),
        (with_frames(lambda frames: []), "frames are zstd 8x32x32x3"),
        (with_frames(lambda frames: [*frames[:3], b"no frame", *frames[4:]]), "frame 3 does not decode"),
        (with_frames(lambda frames: [frames[1], frames[0], *frames[2:]]), "frames have another sha256"),
        (with_field("frames.mp", "codec", "jpeg"), "the manifest promises zstd 8x32x32x3"),
        (with_field("frames.mp", "shape", [8, 32, 16, 3]), "frames are zstd 8x32x16x3"),
        (with_field("frames.mp", "crc32", [0] * 8), "frame 0 has another crc32"),
        (with_field("frames.mp", "crc32", [0] * 7), "frames are zstd 8x32x32x3"),
        (put("cls", b"1"), "label 1 in its member, 0 in the index"),
        (put("cls", b"7"), "label 7 in its member"),
        (put("cls", b"gesture"), "a member is missing or damaged"),
        (put("json", b"{"), "a member is missing or damaged"),
        (put("json", b"[]"), "format version 1"),
        (put("json", b"{}"), "format version 1"),
        (with_field("json", "path", "train/other.npz"), "disagree on key"),
        (with_field("json", "frames_valid", 1), "disagree on frames_valid"),
        (with_field("json", "arrays", {}), "format version 1"),
        (member(lambda members: members.pop("keypoints.mp")), "array 'keypoints' is in its member or in its json, but not in both"),
        (put("keypoints.mp", pack_points(np.array([[0, 0, 0]]), (8, 32, 32))), "array 'keypoints' has another sha256"),
        (put("keypoints.mp", pack_points(np.array([[0, 99, 0]]), (8, 32, 32))), "format version 1"),
        (put("keypoints.mp", b"\x80"), "format version 1"),
    ],
)
def test_wrong_content_under_right_checksums_is_found(change: Change, text: str, packed: Path, check: Check) -> None:
    forge(packed / "zstd", change)
    assert_finds(check, text)


def every_sum(change: Change) -> Change:
    """The change, and then the sums in the first clip's json, too."""

    def apply(clips: dict[str, list[Forged]]) -> None:
        change(clips)
        make_json_right(next(iter(clips.values()))[0].members, lambda blob: hashlib.sha256(blob).hexdigest())

    return apply


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_frames(lambda frames: [frames[1], frames[0], *frames[2:]]), "frames have another sha256"),
        (put("keypoints.mp", pack_points(np.array([[0, 0, 0]]), (8, 32, 32))), "array 'keypoints' has another sha256 or shape"),
        (with_field("keypoints.mp", "shape", [8, 32, 33]), "array 'keypoints' has another sha256 or shape"),
        (with_field("json", "source_shape", [8, 32, 31, 3]), "tells of another source video"),
        (with_field("json", "source", "other"), "disagree on source"),
        (with_field("json", "begin_ms", 7), "disagree on begin_ms"),
        (first(lambda clip: setattr(clip, "video_sha256", "0" * 64)), "disagree on the source video"),
        (first(lambda clip: setattr(clip, "dhash", bytes(24))), "look otherwise than the index says"),
        (first(lambda clip: setattr(clip, "frames_constant", 1)), "look otherwise than the index says"),
    ],
)
def test_wrong_content_is_found_also_under_the_sums_of_the_json(change: Change, text: str, packed: Path, check: Check) -> None:
    forge(packed / "zstd", every_sum(change))
    assert_finds(check, text)


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
@pytest.mark.parametrize("name", ["source", "index", "begin_ms", "end_ms", "frames_valid"])
def test_a_fact_changed_in_json_and_index_alike_is_found(name: str, codec: str, packed: Path, check: Check) -> None:
    def change(clip: Forged) -> None:
        value: Any = "other" if name == "source" else (getattr(clip.facts, name) or 0) - 1
        clip.facts = replace(clip.facts, **{name: value})
        clip.members["json"] = pack_json(json.loads(clip.members["json"]) | {name: value})

    forge(packed / codec, every_sum(first(change)))
    with_home = codec == "jpeg" and name == "frames_valid"  # JPEG does not keep frames of zeros zero: only the npz tells
    assert_finds(check, "looks otherwise" if with_home else "look otherwise" if name == "frames_valid" else "other clips than the plan", codec, with_home)


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_a_label_changed_in_member_and_index_alike_is_found(codec: str, packed: Path, check: Check) -> None:
    def change(clip: Forged) -> None:
        clip.facts = replace(clip.facts, label=1 - clip.facts.label)
        clip.members["cls"] = str(clip.facts.label).encode()

    forge(packed / codec, first(change))
    assert_finds(check, "holds other clips than the plan says", codec)


def exchange(clips: dict[str, list[Forged]], places: tuple[tuple[int, int], tuple[int, int]], parts: str) -> None:
    """Two clips, as (shard, place), exchange all, all but their keys, or their frames alone."""
    names = list(clips)
    (shard_a, a), (shard_b, b) = places
    one, two = clips[names[shard_a]][a], clips[names[shard_b]][b]
    if parts == "whole":
        clips[names[shard_a]][a], clips[names[shard_b]][b] = two, one
        return
    for suffix in ("frames.mp",) if parts == "frames" else tuple(one.members):
        one.members[suffix], two.members[suffix] = two.members[suffix], one.members[suffix]
    for name in ("dhash", "frames_constant", "video_sha256"):
        mine, theirs = getattr(one, name), getattr(two, name)
        setattr(one, name, theirs)
        setattr(two, name, mine)


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
@pytest.mark.parametrize("places", [((0, 0), (0, 1)), ((0, 0), (1, 1))], ids=["inside a shard", "between shards"])
@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ("whole", "holds other clips than the plan says"),
        ("members", "its json and the index disagree on "),
        ("frames", "a member is not the one that its json tells of"),
    ],
)
def test_two_clips_exchanged_are_found(
    parts: str, text: str, places: tuple[tuple[int, int], tuple[int, int]], codec: str, packed: Path, check: Check
) -> None:
    forge(packed / codec, lambda clips: exchange(clips, places, parts))
    assert_finds(check, text, codec)


def test_frames_exchanged_with_all_that_tells_of_them_are_found_with_the_npz_alone(packed: Path, check: Check) -> None:
    """The border of what shards can say of themselves: two clips of one class that exchange everything but their names."""

    def change(clips: dict[str, list[Forged]]) -> None:
        by_label: dict[int, list[Forged]] = {}
        for clip in next(iter(clips.values())) + list(clips.values())[1]:
            by_label.setdefault(clip.facts.label, []).append(clip)
        one, two = next(pair for pair in by_label.values() if len(pair) > 1)[:2]
        exchange({"a": [one], "b": [two]}, ((0, 0), (1, 0)), "members")
        told = [json.loads(clip.members["json"]) for clip in (one, two)]
        valid = [clip.facts.frames_valid for clip in (one, two)]
        for clip, mine, theirs, count in ((one, *told, valid[1]), (two, *told[::-1], valid[0])):
            facts = {name: theirs[name] for name in ("path", "source", "index", "begin_ms", "end_ms")}
            clip.members["json"] = pack_json(mine | facts)
            clip.facts = replace(clip.facts, frames_valid=count)

    forge(packed / "zstd", change)
    assert check(with_home=False)[0] == 0
    assert_finds(check, "its npz changed since it was packed: keypoints, video", with_home=True)


def with_entry(change: Callable[[IndexEntry], IndexEntry]) -> Callable[[ShardIndex], ShardIndex]:
    return lambda index: replace(index, clips=(change(index.clips[0]), *index.clips[1:]))


def with_records(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ShardIndex], ShardIndex]:
    return with_entry(lambda entry: replace(entry, frames=change(entry.frames.copy())))


def shifted(records: np.ndarray) -> np.ndarray:
    records["offset"][5] += 1
    return records


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_records(shifted), "frame 5 is not where the index says"),
        (with_records(lambda records: np.roll(records, 1)), "frame 0 is not where the index says"),
        (with_records(lambda records: records[:-1]), "8 in the member and 7 in the index"),
        (with_entry(lambda entry: replace(entry, facts=replace(entry.facts, label=1))), "holds other clips than the plan says"),
        (with_entry(lambda entry: replace(entry, facts=replace(entry.facts, frames_valid=3))), "disagree on frames_valid"),
        (with_entry(lambda entry: replace(entry, crc32=entry.crc32 | {"json": 0})), "a member has another crc32 than the index says"),
        (with_entry(lambda entry: replace(entry, members=entry.members | {"cls": (513, 1)})), "; the index promises "),
        (lambda index: replace(index, clips=index.clips[::-1]), "; the index promises "),
        (lambda index: replace(index, clips=index.clips[:1]), "holds other clips than the plan says"),
        (lambda index: replace(index, bad=({"path": "train/a/1_x.npz", "reason": "cut"},)), "its splits is not what plans and indexes say"),
        (lambda index: replace(index, plan_id="other"), "is of another plan or shard"),
        (lambda index: replace(index, shard="train-000001"), "is of another plan or shard"),
    ],
)
def test_an_index_that_says_something_else_is_found(change: Callable[[ShardIndex], ShardIndex], text: str, packed: Path, check: Check) -> None:
    forge_index(packed / "zstd", change)
    assert_finds(check, text)


def test_a_frame_too_few_beside_a_whole_index_is_found(packed: Path, check: Check) -> None:
    forge(packed / "zstd", with_frames(lambda frames: frames[:-1]))
    forge_index(packed / "zstd", with_records(lambda records: np.append(records, records[-1:])))
    assert_finds(check, "7 in the member and 8 in the index")


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_a_shard_forged_without_a_change_is_whole(codec: str, packed: Path, check: Check) -> None:
    before = tree(packed / codec)
    forge(packed / codec, every_sum(lambda clips: None))
    assert tree(packed / codec) == before
    assert check(codec)[0] == 0


def test_tell_tale_snippets_differ_in_every_frame_and_clip() -> None:
    """What these tests rest on: no two frames are equal, so an exchange or a shift cannot hide."""
    frames = np.concatenate([tell_tale_video(number, 8, 32, 32) for number in range(6)])
    masks = np.concatenate([tell_tale_mask(number, 8, 32, 32) for number in range(6)])
    assert len({frame.tobytes() for frame in frames}) == len({mask.tobytes() for mask in masks}) == 48
