"""Bytes that are no picture, with the right crc32: none reaches DALI unchecked, and what DALI refuses is named, counted, and shifts no other clip."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from clips.clip import ClipSpec
from clips.codecs import make_codec
from clips.errors import ClipError
from clips.format import pack_index
from clips.manifest import index_path, read_index, read_manifest, tar_path
from loaders import dali_graph
from loaders.dali import carried, carry, look_at
from loaders.dali_graph import DaliGraph
from loaders.home import open_home
from loaders.plan import Plan
from loaders.stream import DecodeIn, Loader
from loaders.views import Views
from tests.loading import MANY_SHARDS_MIB, STORED, by_key, expected_clip, find_entry, flip_byte, keys_in, npz_home, opened, shards

EVERY_FRAME = Views(9, 1)
WHOLE = ClipSpec(STORED.frames, STORED.height, STORED.width)
FUZZED = 1000
Change = Callable[[str, int, bytes], bytes]  # from key, frame and bytes to other bytes


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def packed(base: Path, tmp_path: Path) -> Path:
    """Shards of its own for a test to damage."""
    pytest.importorskip("nvidia.dali")
    return Path(shutil.copytree(shards(base, "jpeg", MANY_SHARDS_MIB), tmp_path / "shards"))


def rewrite(home: Path, change: Change) -> None:
    """Puts changed frames of train at the ends of their shards, and makes index and manifest promise them, crc32 and all."""
    manifest = json.loads((home / "manifest.json").read_text())
    for promise, shard in zip(manifest["splits"]["train"]["shards"], read_manifest(home).splits["train"].shards, strict=True):
        index, tar, clips = read_index(home, "train", shard), tar_path(home, "train", shard.name), []
        blob = tar.read_bytes()
        added = bytearray()
        for entry in index.clips:
            frames = entry.frames.copy()
            for frame, (offset, size, _) in enumerate(entry.frames.tolist()):
                changed = change(entry.facts.key, frame, blob[offset : offset + size])
                if changed != blob[offset : offset + size]:
                    frames[frame] = (len(blob) + len(added), len(changed), zlib.crc32(changed))
                    added += changed
            clips.append(replace(entry, frames=frames))
        tar.write_bytes(blob + added)
        index_path(home, "train", shard.name).write_bytes(pack_index(replace(index, clips=tuple(clips))))
        promise["index_sha256"] = sha256(index_path(home, "train", shard.name).read_bytes()).hexdigest()
        promise["tar_bytes"] = tar.stat().st_size
    (home / "manifest.json").write_text(json.dumps(manifest))


def without_tables(blob: bytes) -> bytes:
    """The same JPEG with its quantization tables called a comment: every header says what it should, and nobody can decode it."""
    assert blob.count(b"\xff\xdb\x00") == 2
    return blob.replace(b"\xff\xdb\x00", b"\xff\xfe\x00")


def test_a_frame_that_dali_refuses_is_an_error_with_its_clip_and_frame(packed: Path) -> None:
    with opened(packed, "dali", spec=WHOLE) as made:
        keys = keys_in(made.evaluation())
    rewrite(packed, lambda key, frame, blob: without_tables(blob) if (key, frame) == (keys[5], 4) else blob)
    path, entry = find_entry(packed, keys[5])
    where = f"{path}: clip '{keys[5]}', member frames.mp at offset {entry.members['frames.mp'][0]}: frame 4 does not decode (DALI refuses it)"
    with opened(packed, "dali", spec=WHOLE) as made:
        seen: list[str] = []
        with pytest.raises(ClipError, match=f"^{re.escape(f'{where}. Run python -m convert verify on its folder.')}$"):
            for batch in made.evaluation():
                seen += batch.key
        assert seen == keys[:4]


@pytest.mark.parametrize("decode_in", ["threads", "process"])
def test_within_the_budget_refused_and_unreadable_clips_stay_in_their_batches_as_zeros(packed: Path, decode_in: DecodeIn) -> None:
    """One that DALI refuses beside a good one, a batch of two of which DALI refuses one and the other's crc32 is wrong, one without a picture."""
    with opened(packed, "dali") as made:
        whole = by_key(made.training(1))
    keys = list(whole)
    bad = {keys[place]: change for place, change in ((2, without_tables), (6, without_tables), (7, bytes), (13, lambda blob: b"no picture"))}
    rewrite(packed, lambda key, frame, blob: bad[key](blob) if key in bad else blob)
    path, entry = find_entry(packed, keys[7])
    for offset, size, _ in entry.frames.tolist():
        flip_byte(path, offset + size - 20)  # in the picture: only the crc32 tells
    with opened(packed, "dali", decode_in=decode_in, max_bad_clips=4) as made:
        assert isinstance(made._graph, DaliGraph)
        made._graph._blank = np.frombuffer(make_codec("jpeg").encode(np.full((24, 32, 3), 99, np.uint8)), np.uint8)  # zeros come from nowhere else
        for _ in range(2):
            batches = list(made.training(1))
            assert keys_in(batches) == keys
            assert [(one.position, one.key) for batch in batches for one in batch.bad] == [(keys.index(key), key) for key in bad]
            assert all(f"clip '{one.key}'" in one.reason for batch in batches for one in batch.bad)
            for batch in batches:
                assert batch.keypoints is not None
                for place, key in enumerate(batch.key):
                    assert batch.weight[place] == (key not in bad)
                    np.testing.assert_array_equal(batch.video[place], whole[key][0] * (key not in bad), key)
                    np.testing.assert_array_equal(batch.keypoints[place], whole[key][1] * (key not in bad), key)
    with opened(packed, "dali", max_bad_clips=3) as made, pytest.raises(ClipError, match="bad clip 4 of a pass; --max-bad-clips allows 3"):
        list(made.training(1))


def test_where_dali_names_no_frame_libjpeg_says_whose_it_is_and_else_the_clips_are_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(packed, "dali") as made:
        keys = keys_in(made.training(0))
    rewrite(packed, lambda key, frame, blob: without_tables(blob) if key == keys[3] else blob)
    monkeypatch.setattr(dali_graph, "SAMPLE", re.compile("nothing like it(.)"))
    with opened(packed, "webdataset", max_bad_clips=1) as made:
        (expected,) = [one for batch in made.training(0) for one in batch.bad]
    with opened(packed, "dali", max_bad_clips=1) as made:
        (bad,) = [one for batch in made.training(0) for one in batch.bad]
        assert (bad.position, bad.key) == (3, keys[3]) == (expected.position, expected.key)
        assert bad.reason.split("(")[0] == expected.reason.split("(")[0]  # the clip's first frame in both
        monkeypatch.setattr(DaliGraph, "_strictly_bad", lambda graph, raw: set())
        with pytest.raises(RuntimeError, match=f"^DALI fails at the clips {keys[2]}, {keys[3]}$"):
            list(made.training(0))


def test_a_dali_that_refuses_blanks_too_is_an_error_and_no_endless_loop(packed: Path) -> None:
    with opened(packed, "dali") as made:
        keys = keys_in(made.training(0))
    rewrite(packed, lambda key, frame, blob: without_tables(blob) if key == keys[3] else blob)
    with opened(packed, "dali", max_bad_clips=1) as made:
        assert isinstance(made._graph, DaliGraph)
        made._graph._blank = np.frombuffer(without_tables(made._graph._blank.tobytes()), np.uint8)
        with pytest.raises(RuntimeError, match=f"^DALI fails at the clips {keys[2]}, {keys[3]}$"):
            list(made.training(0))


def fuzz(blob: bytes, chance: np.random.RandomState) -> bytes:
    """The bytes damaged as files get damaged, and as nobody would damage them; mostly still begun and ended as a JPEG. Half of the time the header stays."""
    low = blob.index(b"\xff\xda") + 14 if chance.randint(2) else 2
    changed, kind = bytearray(blob), chance.randint(7)
    begin, end = sorted(chance.randint(low, len(blob) - 2, 2).tolist())
    if kind == 0:
        for place in chance.randint(low, len(blob) - 2, 1 + chance.randint(8)):
            changed[place] = chance.randint(256)
    elif kind == 1:
        changed[begin:] = b"\xff\xd9"
    elif kind == 2:
        del changed[begin:end]
    elif kind == 3:
        changed[begin:end] = bytes(end - begin)
    elif kind == 4:
        changed[begin:begin] = bytes([0xFF, chance.randint(0xC0, 0xFF)]) + chance.bytes(chance.randint(20))
    elif kind == 5:
        changed[low:-2] = chance.bytes(len(blob) - 2 - low)
    else:
        changed[-2:] = chance.bytes(2)
    return bytes(changed)


def read_fuzzed(home: Path, around: Path, rounds: int) -> tuple[int, int, int]:
    """Of the damaged frames those refused and those given all the same, and frames left alone, each compared; run in a process of its own.

    A batch is one frame of each of the 21 clips, so that good frames are beside bad ones; nine views are all of a clip's frames.
    """
    counts = np.zeros(3, int)
    asked = {"spec": ClipSpec(1, STORED.height, STORED.width), "batch_size": 21, "micro_batch": 21, "max_bad_clips": 21}
    with opened(home, "webdataset", **asked) as made:  # type: ignore[arg-type]  # names and kinds agree
        whole = list(made.evaluation(EVERY_FRAME))
    for number in range(rounds):
        chance = np.random.RandomState(number)
        damaged = {key for place, key in enumerate(whole[0].key) if (place + number) % 3}
        copy = Path(shutil.copytree(home, around / str(number)))
        rewrite(copy, partial(damage, damaged, chance))
        with opened(copy, "dali", **asked) as made:  # type: ignore[arg-type]  # names and kinds agree
            batches = list(made.evaluation(EVERY_FRAME))
        for batch, right in zip(batches, whole, strict=True):
            bad = {one.key for one in batch.bad}
            assert batch.key == right.key and bad <= damaged and batch.weight.tolist() == [float(key not in bad) for key in batch.key]
            counts += len(bad), len(damaged - bad), len(batch) - len(damaged)
            for place, key in enumerate(batch.key):
                if key in bad:
                    assert not batch.video[place].any()
                elif key not in damaged:
                    np.testing.assert_array_equal(batch.video[place], right.video[place], key)
    refused, given, intact = counts.tolist()
    return refused, given, intact


def damage(damaged: set[str], chance: np.random.RandomState, key: str, frame: int, blob: bytes) -> bytes:
    return fuzz(blob, chance) if key in damaged else blob


def test_a_thousand_fuzzed_frames_with_the_right_crc32_end_no_process_and_shift_no_clip(packed: Path, tmp_path: Path) -> None:
    """In a process of its own, whose end by a signal is an error here. What DALI gives all the same may look like anything."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other_process:
        refused, given, intact = other_process.submit(read_fuzzed, packed, tmp_path, -(-FUZZED // (14 * 9))).result()
    assert refused + given >= FUZZED and intact == (refused + given) / 2
    assert refused > 300 < given


@pytest.mark.parametrize("kind", ["tiny", "other size", "grey", "begins otherwise", "ends otherwise", "a size that lies", "png", "nothing"])
def test_no_byte_reaches_dali_before_its_jpeg_was_looked_at(kind: str) -> None:
    frame = np.random.RandomState(0).randint(0, 256, (24, 32, 3), np.uint8)
    right = make_codec("jpeg").encode(frame)
    place = right.index(b"\xff\xc0") + 5
    wrong = {
        "tiny": b"\xff\xd8\xff\xd9",
        "other size": make_codec("jpeg").encode(np.zeros((32, 24, 3), np.uint8)),
        "grey": simplejpeg.encode_jpeg(np.ascontiguousarray(frame[..., :1]), colorspace="GRAY"),
        "begins otherwise": b"\xff\xd7" + right[2:],
        "ends otherwise": right[:-1],
        "a size that lies": right[:place] + struct.pack(">HH", 4000, 4000) + right[place + 4 :],
        "png": b"\x89PNG\r\n\x1a\n" + right[8:],
        "nothing": b"",
    }[kind]
    look_at(right, (24, 32))
    with pytest.raises(ValueError):
        look_at(wrong, (24, 32))


def test_a_row_gives_back_the_bytes_that_it_carries_and_blanks_where_there_are_none() -> None:
    blobs = [b"\xff\xd8a\xff\xd9", b"", bytes(range(256)), b"x" * 60]
    rows, blank = np.full((4, 320), 7, np.uint8), np.frombuffer(b"blank", np.uint8)
    for row, blob in zip(rows, blobs, strict=True):
        carry(blob, row)
    assert [part.tobytes() for part in carried(rows, blank)] == [blobs[0], b"blank", blobs[2], blobs[3]]


def test_expected_pixels_are_those_of_the_snippets(packed: Path, base: Path) -> None:
    """What the other tests here compare with is itself near the npz."""
    with opened(packed, "dali", spec=ClipSpec(5, 24, 32)) as made:
        for key, (video, _, _) in by_key(made.evaluation()).items():
            assert np.abs(video.astype(int) - expected_clip(npz_home(base), key, ClipSpec(5, 24, 32), None)[0]).mean() < 2


def test_of_a_part_of_a_split_the_clip_that_dali_refuses_is_named_by_its_own_key(packed: Path) -> None:
    fold = open_home(packed, "dali", fold="1/2").sources["train"].facts
    bad = fold[-1].key
    rewrite(packed, lambda key, frame, blob: without_tables(blob) if key == bad else blob)
    part = open_home(packed, "dali", fold="1/2").sources["train"]
    plan = Plan(len(part.facts), len(part.facts), len(part.facts), seed=1)
    loader = Loader(part, plan, ClipSpec(STORED.frames, STORED.height, STORED.width), torch.device("cpu"), 2, max_bad_clips=1)
    found = [clip for batch in loader.training(0) for clip in batch.bad]
    loader.close()
    assert [clip.key for clip in found] == [bad] and f"'{bad}'" in found[0].reason
