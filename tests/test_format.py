"""Format version 1, byte by byte: members, index and manifest, and what happens to bytes that are none of them."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clips.format import (
    FRAME,
    ClipFacts,
    FormatError,
    IndexEntry,
    ShardIndex,
    pack_array,
    pack_frames,
    pack_index,
    pack_json,
    pack_map,
    pack_points,
    unpack_array,
    unpack_index,
    unpack_map,
    unpack_points,
)
from clips.manifest import (
    index_path,
    tar_path,
)
from clips.snippets import Bad
from convert.encode import EncodedClip
from convert.writer import write_shard

FACTS = ClipFacts("train/gesture/000000012_x", 1, "x", 12, 0, 1300, 2)


def hand_made(key: str = FACTS.key, blobs: tuple[bytes, ...] = (b"\xff\xd8one", b"second")) -> EncodedClip:
    """A clip whose frames are no pictures: nothing here depends on a codec library."""
    frames_member, records = pack_frames("jpeg", (len(blobs), 4, 6, 3), blobs)
    members = (
        ("cls", b"1"),
        ("frames.mp", frames_member),
        ("json", pack_json({"path": f"{key}.npz", "index": 12})),
        ("keypoints.mp", pack_points(np.array([[0, 1, 2], [1, 3, 258]]), (2, 4, 300))),
    )
    return EncodedClip(replace(FACTS, key=key), "d" * 64, bytes(range(24)), 0, members, records)


# --- members


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.binary(max_size=300), st.integers(250, 70_000).map(bytes)), max_size=20))
def test_each_record_points_at_just_its_frame(blobs: list[bytes]) -> None:
    member, records = pack_frames("zstd", (len(blobs), 2, 3, 3), blobs)
    assert [member[r["offset"] : r["offset"] + r["size"]] for r in records] == blobs
    assert [int(r["crc32"]) for r in records] == [zlib.crc32(blob) for blob in blobs]
    assert msgpack.unpackb(member) == {
        "codec": "zstd",
        "shape": [len(blobs), 2, 3, 3],
        "frames": blobs,
        "crc32": [zlib.crc32(blob) for blob in blobs],
    }


def test_the_frames_member_is_these_bytes() -> None:
    """Written out by hand from the msgpack specification."""
    member, records = pack_frames("jpeg", (2, 4, 6, 3), (b"ab", b""))
    expected = (
        b"\x84"  # a map of 4
        b"\xa5codec\xa4jpeg"
        b"\xa5shape\x94\x02\x04\x06\x03"
        b"\xa6frames\x92\xc4\x02ab\xc4\x00"
        b"\xa5crc32\x92\xce\x9e\x83\x48\x6d\x00"
    )
    assert member == expected
    assert records.tobytes() == bytes.fromhex("2100000000000000 02000000 6d48839e  2500000000000000 00000000 00000000")


def test_the_keypoints_member_is_these_bytes() -> None:
    member = pack_points(np.array([[0, 1, 2], [38, 319, 258]]), (39, 320, 320))
    assert member == b"\x82\xa5shape\x93\x27\xcd\x01\x40\xcd\x01\x40\xa6points\xc4\x0c" + bytes.fromhex("0000 0100 0200  2600 3f01 0201")
    points, shape = unpack_points(member)
    assert shape == (39, 320, 320) and points.tolist() == [[0, 1, 2], [38, 319, 258]]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
        np.array(29.97),
        np.zeros((0, 3), np.int16),
        np.array([True, False]),
        np.array(["ab", "é"]),
        np.array([b"x", b"yz"]),
        np.array(["2020-01-01"], "M8[D]"),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_a_kept_array_comes_back_bit_exact(array: np.ndarray) -> None:
    back = unpack_array(pack_array(array))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    packed = msgpack.unpackb(pack_array(array))
    assert zstandard.ZstdDecompressor().decompress(packed.pop("zstd")) == array.tobytes()
    assert packed == {"dtype": array.dtype.str, "shape": list(array.shape)}


@pytest.mark.parametrize("packed", [{}, {"dtype": "|u1", "shape": [3], "zstd": b"no frame"}, {"dtype": "|u1", "shape": [4], "zstd": None}])
def test_a_member_that_is_no_array_is_a_format_error(packed: dict[str, Any]) -> None:
    whole = msgpack.unpackb(pack_array(np.arange(3, dtype=np.uint8)))
    for blob in (packed, whole | {"shape": [4]}, whole | {"dtype": "<f4"}, whole | {"dtype": "no dtype"}):
        with pytest.raises(FormatError, match="not an array"):
            unpack_array(pack_map(blob))


def test_json_is_sorted_compact_utf8() -> None:
    assert pack_json({"b": 1, "a": {"d": None, "c": "é"}}) == '{"a":{"c":"é","d":null},"b":1}'.encode()


# --- index

ENTRY_MEMBERS = {"cls": (512, 1), "frames.mp": (1536, 60)}


def an_index(num_clips: int = 1, bad: tuple[dict[str, str], ...] = (), mended: tuple[dict[str, Any], ...] = ()) -> ShardIndex:
    frames = np.array([(1560, 5, 7), (2**40, 2**31, 2**32 - 1)], FRAME)
    facts = [replace(FACTS, key=f"{FACTS.key}{n}") for n in range(num_clips)]
    entries = tuple(IndexEntry(one, "d" * 64, bytes(24), 1, dict(ENTRY_MEMBERS), {"cls": 7, "frames.mp": 2**32 - 1}, frames) for one in facts)
    return ShardIndex("f" * 64, "train-000000", 10240, "a" * 64, bad, entries, mended)


def assert_same(one: ShardIndex, two: ShardIndex) -> None:
    assert replace(one, clips=()) == replace(two, clips=())
    assert len(one.clips) == len(two.clips)
    for a, b in zip(one.clips, two.clips, strict=True):
        assert replace(a, frames=None) == replace(b, frames=None)  # type: ignore[arg-type]  # arrays are compared by themselves
        assert a.frames.dtype == b.frames.dtype == FRAME and np.array_equal(a.frames, b.frames)


@pytest.mark.parametrize("num_clips", [0, 1, 3, 70])
def test_an_index_comes_back(num_clips: int) -> None:
    index = an_index(num_clips, ({"path": "train/a/1_x.npz", "reason": "cut"},), ({"path": "train/a/2_x.npz", "bytes": 2**40},))
    assert_same(unpack_index(pack_index(index)), index)


def test_an_index_holds_these_fields_and_records_of_16_bytes() -> None:
    frames = bytes.fromhex("1806000000000000 05000000 07000000  0000000000010000 00000080 ffffffff")
    assert msgpack.unpackb(pack_index(an_index())) == {
        "format": 1,
        "plan_id": "f" * 64,
        "shard": "train-000000",
        "tar_bytes": 10240,
        "tar_sha256": "a" * 64,
        "bad": [],
        "mended": [],
        "clips": [
            {
                "key": "train/gesture/000000012_x0",
                "label": 1,
                "source": "x",
                "index": 12,
                "begin_ms": 0,
                "end_ms": 1300,
                "frames_valid": 2,
                "video_sha256": "d" * 64,
                "dhash": bytes(24),
                "frames_constant": 1,
                "crc32": {"cls": 7, "frames.mp": 2**32 - 1},
                "members": {"cls": [512, 1], "frames.mp": [1536, 60]},
                "frames": frames,
            }
        ],
    }


def test_unknown_fields_of_an_index_are_ignored() -> None:
    packed = msgpack.unpackb(pack_index(an_index()))
    packed["later"] = packed["clips"][0]["later"] = {"more": 1}
    assert_same(unpack_index(pack_map(packed)), an_index())


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_an_index_of_another_version_is_named(version: Any) -> None:
    packed = msgpack.unpackb(pack_index(an_index())) | {"format": version}
    with pytest.raises(FormatError, match=f"format version {version}; this program reads version 1"):
        unpack_index(pack_map(packed))


@pytest.mark.parametrize("name", ["plan_id", "shard", "tar_bytes", "tar_sha256", "bad", "mended", "clips"])
def test_an_index_without_a_field_is_a_format_error(name: str) -> None:
    packed = msgpack.unpackb(pack_index(an_index()))
    del packed[name]
    with pytest.raises(FormatError, match=name):
        unpack_index(pack_map(packed))


@pytest.mark.parametrize("name", ["key", "label", "source", "video_sha256", "dhash", "frames_constant", "members", "crc32", "frames"])
def test_a_clip_of_an_index_without_a_field_is_a_format_error(name: str) -> None:
    packed = msgpack.unpackb(pack_index(an_index()))
    del packed["clips"][0][name]
    with pytest.raises(FormatError, match=name):
        unpack_index(pack_map(packed))


@pytest.mark.parametrize(("name", "value"), [("members", []), ("members", {"cls": 3}), ("frames", b"15 bytes of them"[:15]), ("frames", "text")])
def test_an_index_with_a_field_of_another_kind_is_a_format_error(name: str, value: Any) -> None:
    packed = msgpack.unpackb(pack_index(an_index()))
    packed["clips"][0][name] = value
    with pytest.raises(FormatError, match="without its fields"):
        unpack_index(pack_map(packed))


def test_an_index_cut_anywhere_is_a_format_error() -> None:
    blob = pack_index(an_index(2))
    for length in range(len(blob)):
        with pytest.raises(FormatError):
            unpack_index(blob[:length])


def test_an_index_with_any_damaged_byte_is_an_index_or_a_format_error() -> None:
    blob = pack_index(an_index(1))
    for place in range(len(blob)):
        for value in {0x80, 0x90, 0xC0, 0xC1, 0xC4, 0xDF, 0x01, blob[place] ^ 1}:
            try:
                unpack_index(blob[:place] + bytes([value]) + blob[place + 1 :])
            except FormatError:
                continue


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_any_other_bytes_are_a_format_error(blob: bytes) -> None:
    with pytest.raises(FormatError):
        unpack_index(blob)


@pytest.mark.parametrize("value", [1, "text", [1], None])
def test_msgpack_that_is_no_map_is_a_format_error(value: Any) -> None:
    with pytest.raises(FormatError, match="expected a map"):
        unpack_map(msgpack.packb(value))


# --- shard

LONG = "train/gesture/000000012_" + "long" * 50  # beyond the 100 characters of a plain tar name
FOREIGN = "train/geste/000000012_émission ☺"


def test_a_shard_is_a_plain_tar_whose_index_tells_every_place(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    clips = [hand_made(), hand_made(LONG, (b"x" * 1000, b"", b"y" * 70_000)), hand_made(FOREIGN)]
    index = write_shard(tmp_path, "train", "train-000000", "id", clips)
    path = tar_path(tmp_path, "train", "train-000000")
    blob = path.read_bytes()
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
        contents = {info.name: tar.extractfile(info).read() for info in infos}  # type: ignore[union-attr]  # all are files
    expected = {f"{clip.facts.key}.{suffix}": member for clip in clips for suffix, member in clip.members}
    assert contents == expected and [info.name for info in infos] == list(expected)
    places = {f"{entry.facts.key}.{suffix}": place for entry in index.clips for suffix, place in entry.members.items()}
    assert places == {info.name: (info.offset_data, info.size) for info in infos}
    for clip, entry in zip(clips, index.clips, strict=True):
        frames = msgpack.unpackb(dict(clip.members)["frames.mp"])["frames"]
        assert [blob[r["offset"] : r["offset"] + r["size"]] for r in entry.frames] == frames
    crc32 = {f"{entry.facts.key}.{suffix}": value for entry in index.clips for suffix, value in entry.crc32.items()}
    assert crc32 == {name: zlib.crc32(member) for name, member in contents.items()}
    for info in infos:
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode, info.isfile()) == (0, 0, 0, "", "", 0o644, True)
    assert len(blob) == index.tar_bytes and len(blob) % tarfile.RECORDSIZE == 0 and not any(blob[-1024:])
    assert hashlib.sha256(blob).hexdigest() == index.tar_sha256
    assert_same(unpack_index(index_path(tmp_path, "train", "train-000000").read_bytes()), index)


def test_a_shard_is_the_tar_that_pythons_tarfile_writes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    blocks = tuple((f"{size}.mp", bytes(size)) for size in (0, 511, 512, 513, 10240))
    clips = [hand_made(), hand_made(LONG), hand_made(FOREIGN), replace(hand_made("train/a/1_blocks"), members=blocks)]
    write_shard(tmp_path, "train", "train-000000", "id", clips)
    import io

    with tarfile.open(tmp_path / "by_hand.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for clip in clips:
            for suffix, member in clip.members:
                info = tarfile.TarInfo(f"{clip.facts.key}.{suffix}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    assert tar_path(tmp_path, "train", "train-000000").read_bytes() == (tmp_path / "by_hand.tar").read_bytes()


def test_the_bytes_of_version_1_are_pinned(tmp_path: Path) -> None:
    """Another sum here means that old shards and new ones differ: raise FORMAT_VERSION, or undo the change."""
    (tmp_path / "train").mkdir()
    bad = [Bad("train/gesture/000000013_x.npz", "cut")]
    index = write_shard(tmp_path, "train", "train-000000", "f" * 64, [hand_made(), hand_made(FOREIGN)], bad, {"train/gesture/000000014_x.npz": 77})
    index_blob = index_path(tmp_path, "train", "train-000000").read_bytes()
    assert (index.tar_bytes, len(index_blob)) == (20480, 1067)
    assert index.tar_sha256 == "6d6ef867e2d4b1359111e6e8fc8c96e9707cb255b689222d96eed8458645da7d"
    assert hashlib.sha256(index_blob).hexdigest() == "33e8426574ebd8f4d3b8b7bf9204c08307d42b1b3a6b4dae5ae0c256d576696c"


def test_a_shard_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()

    def clips() -> Any:
        yield hand_made()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shard(tmp_path, "train", "train-000000", "id", clips())
    assert list((tmp_path / "train").iterdir()) == []
