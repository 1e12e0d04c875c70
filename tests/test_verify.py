"""verify: clean shards pass with the right verdict, and every kind of damage is found and named."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from making import tell_tale_mask, tell_tale_video, write_home
from packing import rewrite, snippets_of, use_threads

from clips.errors import InputError
from clips.files import sha256_of
from clips.format import IndexEntry, ShardIndex, pack_frames, pack_index, pack_json, pack_map, pack_points, unpack_index
from clips.manifest import index_path, read_manifest, tar_path, write_manifest
from convert.encode import EncodedClip
from convert.pack import PackConfig, pack
from convert.verify import VerifyConfig, psnr_db, verify
from convert.writer import write_shard

COUNTS = {"train": {"nongesture": 4, "gesture": 2}, "val": {"nongesture": 1, "gesture": 1}}


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a home and its shards as zstd and as jpeg."""
    folder = tmp_path_factory.mktemp("packed")
    home = write_home(folder, COUNTS, padded_every=3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_threads(monkeypatch)
        pack(PackConfig(home, folder / "zstd", codec="zstd", shard_mib=0.06, workers=2))
        pack(PackConfig(home, folder / "jpeg", codec="jpeg", shard_mib=0.03, quality=97, workers=2))
    yield folder


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder to damage."""
    use_threads(monkeypatch)
    shutil.copytree(packed_once, tmp_path / "here")
    return tmp_path / "here"


Check = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(packed: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Check:
    """Exit code, stdout and log of a verify run on the shards of a codec, with the home or without."""

    def run(codec: str = "zstd", with_home: bool = True) -> tuple[int, str, str]:
        caplog.clear()
        capsys.readouterr()
        with caplog.at_level(logging.INFO):
            code = verify(VerifyConfig(packed / codec, home_of(packed) if with_home else None, workers=2))
        return code, capsys.readouterr().out, caplog.text

    return run


def home_of(packed: Path) -> Path:
    return next(path for path in packed.iterdir() if path.name.startswith("ellen"))


def assert_finds(check: Check, text: str, codec: str = "zstd", with_home: bool = False) -> None:
    code, out, log = check(codec, with_home)
    assert code == 1 and text in log, log
    assert not out.endswith(", 0 problems\n") and len(out.splitlines()) == 1  # no verdict over damaged shards


# --- clean


def test_whole_lossless_shards_are_bit_exact(check: Check) -> None:
    assert check() == (0, "8 clips in 4 shards checked, 0 problems\nbit-exact: npz can be rebuilt\n", "")


def test_whole_lossy_shards_say_how_lossy(check: Check) -> None:
    code, out, log = check("jpeg")
    assert code == 0 and "low quality" not in log
    first, last = out.splitlines()
    assert first == "8 clips in 5 shards checked, 0 problems" or first.endswith(" shards checked, 0 problems")
    assert last.startswith("frames lossy (min ") and last.endswith(" dB): keep the npz or pack zstd")
    least, mean = (float(word) for word in last.replace("(", " ").split() if word.replace(".", "").isdigit())
    assert 35 < least <= mean < 60


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_without_the_npz_only_wholeness_is_promised(codec: str, check: Check) -> None:
    code, out, _ = check(codec, with_home=False)
    assert code == 0
    assert out.splitlines()[-1] == "whole: as packed. Whether it equals the npz: python -m convert verify --dataset-home"


def test_the_verdict_names_what_was_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 1}}, frames=2, height=8, width=8)
    rewrite(snippets_of(home)[0], fps=np.array(29.97), flow=np.arange(3))
    base = PackConfig(home, tmp_path, codec="zstd", workers=1)
    for name, config, last in [
        ("kept", replace(base, extras="keep"), "bit-exact: npz can be rebuilt"),
        ("dropped", replace(base, extras="drop"), "bit-exact: npz can be rebuilt; not packed: flow, fps"),
        ("none", replace(base, extras="keep", keypoints="none"), "bit-exact: npz can be rebuilt; not packed: keypoints, where there was one"),
    ]:
        pack(replace(config, output=tmp_path / name))
        assert verify(VerifyConfig(tmp_path / name, home, workers=1)) == 0
        assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_clip_that_jpeg_keeps_exactly_spoils_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 2}}, frames=2)
    rewrite(snippets_of(home)[0], video=np.full((2, 32, 32, 3), 128, np.uint8))
    pack(PackConfig(home, tmp_path / "out", quality=97, workers=1))
    assert verify(VerifyConfig(tmp_path / "out", home, workers=1)) == 0
    assert "inf" not in capsys.readouterr().out


def test_low_quality_is_said_and_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 12}}, frames=2)
    pack(PackConfig(home, tmp_path / "out", quality=3, workers=1))
    assert verify(VerifyConfig(tmp_path / "out", home, workers=1)) == 0
    lines = [record.message for record in caplog.records if "low quality" in record.message]
    assert len(lines) == 11 and lines[-1] == "low quality: 2 more clips below 35 dB"
    assert all("has " in line and "below 35; take a higher --quality or --codec zstd" in line for line in lines[:-1])


def test_psnr_is_the_textbooks() -> None:
    chance = np.random.RandomState(0)
    a, b = chance.randint(0, 256, (2, 3, 9, 7, 3)).astype(np.uint8)
    mean_square = np.mean((a.astype(np.float64) - b) ** 2)
    assert psnr_db(a, b) == pytest.approx(10 * np.log10(255**2 / mean_square), abs=1e-4)
    assert psnr_db(a, a) == np.inf
    assert psnr_db(np.zeros_like(a), np.full_like(a, 255)) == pytest.approx(0, abs=1e-6)


# --- damaged files


def flip(path: Path, place: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)


def test_a_flipped_byte_anywhere_in_a_tar_is_found(packed: Path, check: Check) -> None:
    path = tar_path(packed / "zstd", "train", "train-000000")
    size = path.stat().st_size
    for place in (0, 156, 511, 512, 3000, size // 2, size - 1):  # name, type, header, data, frames, padding at the end
        flip(path, place)
        assert_finds(check, "train-000000.tar: sha256 is not the manifest's")
        flip(path, place)
    assert check(with_home=False)[0] == 0


def test_a_flipped_byte_anywhere_in_an_index_is_found(packed: Path, check: Check) -> None:
    path = index_path(packed / "zstd", "train", "train-000001")
    size = path.stat().st_size
    for place in (0, size // 3, size - 1):
        flip(path, place)
        assert_finds(check, "train-000001.index.mp: sha256 is not the manifest's")
        flip(path, place)
    assert check(with_home=False)[0] == 0


@pytest.mark.parametrize("length", [0, 100, 512, 5000, -1])
def test_a_tar_cut_short_is_found(length: int, packed: Path, check: Check) -> None:
    path = tar_path(packed / "zstd", "val", "val-000000")
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    assert_finds(check, "val-000000.tar: sha256 is not the manifest's")


def test_bytes_after_a_tar_are_found(packed: Path, check: Check) -> None:
    path = tar_path(packed / "zstd", "val", "val-000000")
    path.write_bytes(path.read_bytes() + b"\0")
    assert_finds(check, "val-000000.tar: sha256 is not the manifest's")


@pytest.mark.parametrize("name", ["train/train-000001.tar", "train/train-000001.index.mp"])
def test_a_missing_file_is_found(name: str, packed: Path, check: Check) -> None:
    (packed / "zstd" / name).unlink()
    assert_finds(check, f"{packed / 'zstd' / name}: cannot be read (No such file or directory).")


@pytest.mark.parametrize("name", ["train/train-000099.tar", "train/other.tar", "val/train-000000.tar"])
def test_a_stranger_is_found(name: str, packed: Path, check: Check) -> None:
    shutil.copy(packed / "zstd/train/train-000000.tar", packed / "zstd" / name)
    assert_finds(check, f"{packed / 'zstd' / name}: not in the manifest.")


def test_a_stranger_in_a_folder_of_no_packed_split_is_found(packed: Path, check: Check) -> None:
    (packed / "zstd/test").mkdir()
    shutil.copy(packed / "zstd/train/train-000000.tar", packed / "zstd/test/test-000000.tar")
    assert_finds(check, "test-000000.tar: not in the manifest.")


@pytest.mark.parametrize("suffixes", [(".tar",), (".tar", ".index.mp")])
def test_two_shards_exchanged_are_found(suffixes: tuple[str, ...], packed: Path, check: Check) -> None:
    folder = packed / "zstd/train"
    for suffix in suffixes:
        one, two = folder / f"train-000000{suffix}", folder / f"train-000001{suffix}"
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
    code, _out, log = check(with_home=False)
    assert code == 1 and "train-000000" in log and "train-000001" in log


def test_all_damage_is_listed_at_once(packed: Path, check: Check) -> None:
    flip(tar_path(packed / "zstd", "train", "train-000000"), 5000)
    index_path(packed / "zstd", "train", "train-000001").unlink()
    shutil.copy(packed / "zstd/train/train-000002.tar", packed / "zstd/val/more.tar")
    code, out, log = check(with_home=False)
    assert code == 1 and out.splitlines()[0].endswith(" 3 problems")
    assert all(name in log for name in ("train-000000.tar", "train-000001.index.mp", "more.tar"))


def test_a_folder_without_a_manifest_and_a_missing_folder_are_refused(packed: Path, check: Check) -> None:
    (packed / "zstd/manifest.json").unlink()
    for folder in (packed / "zstd", packed / "nowhere"):
        with pytest.raises(InputError, match=r"manifest.json: missing; expected shards that were packed to the end"):
            verify(VerifyConfig(folder))


# --- the source changed


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
@pytest.mark.parametrize("array", ["video", "keypoints"])
def test_a_changed_npz_is_found(array: str, codec: str, packed: Path, check: Check) -> None:
    path = snippets_of(home_of(packed) / "train")[1]
    with np.load(path) as arrays:
        changed = arrays[array].copy()
    changed[0, 0, 0] = 1 - changed[0, 0, 0] if array == "keypoints" else changed[0, 0, 0] ^ 1  # one pixel, one step
    rewrite(path, **{array: changed})
    key = path.relative_to(home_of(packed)).as_posix().removesuffix(".npz")
    assert_finds(check, f"clip '{key}': its npz changed since it was packed: {array}", codec, with_home=True)


def test_a_kept_array_that_changed_in_the_npz_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 1}}, frames=2, height=8, width=8)
    rewrite(snippets_of(home)[0], fps=np.array(29.97))
    pack(PackConfig(home, tmp_path / "out", codec="zstd", extras="keep", workers=1))
    rewrite(snippets_of(home)[0], fps=np.array(25.0))
    assert verify(VerifyConfig(tmp_path / "out", home, workers=1)) == 1
    assert "its npz changed since it was packed: fps" in caplog.text


def test_a_snippet_moved_to_another_class_is_found(packed: Path, check: Check) -> None:
    path = snippets_of(home_of(packed) / "train/gesture")[0]
    path.rename(home_of(packed) / "train/nongesture" / path.name)
    assert_finds(check, f"clip 'train/gesture/{path.stem}': its npz is not in {home_of(packed)}", with_home=True)


def test_a_removed_a_broken_and_an_added_snippet_are_found(packed: Path, check: Check) -> None:
    first, second = snippets_of(home_of(packed) / "train")[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert_finds(check, "its npz cannot be read: not a whole npz", with_home=True)
    first.unlink()
    assert_finds(check, "its npz is not in", with_home=True)
    first.write_bytes(whole)
    shutil.copy(second, second.with_name("999999999_more.npz"))
    assert_finds(check, "train: the home holds 7 snippets and the shards 6 clips.", with_home=True)


def test_a_mask_that_came_or_went_is_found(packed: Path, check: Check) -> None:
    path = snippets_of(home_of(packed) / "train")[0]
    rewrite(path, keypoints=None)
    assert_finds(check, "its npz cannot be read: no array 'keypoints'", with_home=True)


# --- shards whose sums are right and whose content is not


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The first shard of train written anew with the members of its first clip changed, and all checksums right."""
    name = read_manifest(folder).splits["train"].shards[0].name
    index = unpack_index(index_path(folder, "train", name).read_bytes())
    with tarfile.open(tar_path(folder, "train", name)) as tar:
        blobs = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]  # all are files
    clips = []
    for number, entry in enumerate(index.clips):
        members: dict[str, Any] = {suffix: blobs[f"{entry.facts.key}.{suffix}"] for suffix in entry.members}
        if number == 0:
            change(members)
        frames = msgpack.unpackb(members["frames.mp"])
        _, records = pack_frames(frames["codec"], tuple(frames["shape"]), frames["frames"])
        clips.append(EncodedClip(entry.facts, entry.dhash, tuple(members.items()), records))
    write_shard(folder, "train", name, index.plan_id, clips)
    forge_index(folder, lambda index: index)


def forge_index(folder: Path, change: Callable[[ShardIndex], ShardIndex]) -> None:
    """The index of the first shard of train changed, and the manifest with it."""
    manifest = read_manifest(folder)
    split = manifest.splits["train"]
    path = index_path(folder, "train", split.shards[0].name)
    index = change(unpack_index(path.read_bytes()))
    path.write_bytes(pack_index(index))
    shard = replace(split.shards[0], tar_bytes=index.tar_bytes, tar_sha256=index.tar_sha256, index_sha256=sha256_of(path))
    write_manifest(folder, replace(manifest, splits=manifest.splits | {"train": replace(split, shards=(shard, *split.shards[1:]))}))


def with_frames(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[dict[str, Any]], None]:
    def apply(members: dict[str, Any]) -> None:
        packed = msgpack.unpackb(members["frames.mp"])
        members["frames.mp"] = pack_frames(packed["codec"], tuple(packed["shape"]), change(packed["frames"]))[0]

    return apply


def with_field(member: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(members: dict[str, Any]) -> None:
        load, dump = (json.loads, pack_json) if member == "json" else (msgpack.unpackb, pack_map)
        members[member] = dump(load(members[member]) | {name: value})

    return apply


def put(member: str, blob: bytes) -> Callable[[dict[str, Any]], None]:
    return lambda members: members.update({member: blob})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_frames(lambda frames: frames[:-1]), "frames are zstd [8, 32, 32, 3]"),
        (with_frames(lambda frames: [*frames, frames[0]]), "frames are zstd [8, 32, 32, 3]"),
        (with_frames(lambda frames: []), "frames are zstd [8, 32, 32, 3]"),
        (with_frames(lambda frames: [*frames[:3], b"no frame", *frames[4:]]), "frame 3 does not decode"),
        (with_frames(lambda frames: [frames[1], frames[0], *frames[2:]]), "frames have another sha256"),
        (with_field("frames.mp", "codec", "jpeg"), "the manifest promises zstd [8, 32, 32, 3]"),
        (with_field("frames.mp", "shape", [8, 32, 16, 3]), "frames are zstd [8, 32, 16, 3]"),
        (with_field("frames.mp", "crc32", [0] * 8), "frame 0 has another crc32"),
        (with_field("frames.mp", "crc32", [0] * 7), "frames are zstd [8, 32, 32, 3]"),
        (put("cls", b"1"), "label 1 in its member, 0 in the index"),
        (put("cls", b"7"), "label 7 in its member"),
        (put("cls", b"gesture"), "a member is missing or damaged"),
        (put("json", b"{"), "a member is missing or damaged"),
        (put("json", b"[]"), "format version 1"),
        (put("json", b"{}"), "format version 1"),
        (with_field("json", "path", "train/other.npz"), "disagree on the path"),
        (with_field("json", "frames_valid", 1), "disagree on the path or on frames_valid"),
        (with_field("json", "arrays", {}), "format version 1"),
        (lambda members: members.pop("keypoints.mp"), "array 'keypoints' is in its member or in its json, but not in both"),
        (put("keypoints.mp", pack_points(np.array([[0, 0, 0]]), (8, 32, 32))), "array 'keypoints' has another sha256"),
        (put("keypoints.mp", pack_points(np.array([[0, 99, 0]]), (8, 32, 32))), "format version 1"),
        (put("keypoints.mp", b"\x80"), "format version 1"),
    ],
)
def test_wrong_content_under_right_checksums_is_found(change: Callable[[dict[str, Any]], None], text: str, packed: Path, check: Check) -> None:
    forge(packed / "zstd", change)
    assert_finds(check, text)


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
        (with_entry(lambda entry: replace(entry, facts=replace(entry.facts, label=1))), "label 0 in its member, 1 in the index"),
        (with_entry(lambda entry: replace(entry, facts=replace(entry.facts, frames_valid=3))), "disagree on the path or on frames_valid"),
        (with_entry(lambda entry: replace(entry, members=entry.members | {"cls": (513, 1)})), "; the index promises "),
        (lambda index: replace(index, clips=index.clips[::-1]), "; the index promises "),
        (lambda index: replace(index, clips=index.clips[:1]), "is of another plan or shard"),
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


def test_a_shard_forged_without_a_change_is_whole(packed: Path, check: Check) -> None:
    before = (packed / "zstd/manifest.json").read_bytes()
    forge(packed / "zstd", lambda members: None)
    assert (packed / "zstd/manifest.json").read_bytes() == before
    assert check()[0] == 0


def test_tell_tale_snippets_differ_in_every_frame_and_clip() -> None:
    """What these tests rest on: no two frames are equal, so an exchange or a shift cannot hide."""
    frames = np.concatenate([tell_tale_video(number, 8, 32, 32) for number in range(6)])
    masks = np.concatenate([tell_tale_mask(number, 8, 32, 32) for number in range(6)])
    assert len({frame.tobytes() for frame in frames}) == len({mask.tobytes() for mask in masks}) == 48
