"""npz to shards: what is in them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zstandard
from PIL import Image

from clips.clip import ClipSpec
from clips.codecs import CODECS, make_codec
from clips.format import unpack_index
from convert.pack import PackConfig, pack
from tests.making import tell_tale_mask, tell_tale_video, write_home
from tests.packing import mask_by_hand, members_of, pack_all, refused, rewrite, snippets_of, source_of, zstd_video

# --- what is in the shards


def test_every_snippet_is_in_the_shards_bit_exact(packing: PackConfig) -> None:
    pack(packing)
    members = members_of(packing.output)
    keys = {name.split(".")[0] for name in members}
    assert keys == {path.relative_to(packing.dataset_home).as_posix().removesuffix(".npz") for path in snippets_of(packing.dataset_home)}
    assert len(members) == 4 * len(keys)
    for key in keys:
        arrays = source_of(packing.dataset_home, key)
        assert np.array_equal(zstd_video(members[f"{key}.frames.mp"]), arrays["video"])
        assert np.array_equal(mask_by_hand(members[f"{key}.keypoints.mp"]), arrays["keypoints"])
        assert members[f"{key}.cls"] == {"nongesture": b"0", "gesture": b"1"}[key.split("/")[1]]
        told = json.loads(members[f"{key}.json"])
        assert told["path"] == f"{key}.npz" and told["source_shape"] == [8, 32, 32, 3]
        assert told["frames_valid"] == (8 if arrays["video"][-1].any() else 6)
        assert told["arrays"] == {
            name: {"dtype": "|u1", "shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()} for name, array in arrays.items()
        }
        assert told["members"] == {suffix: hashlib.sha256(members[f"{key}.{suffix}"]).hexdigest() for suffix in ("frames.mp", "keypoints.mp")}
        assert told["begin_ms"] is None or told["end_ms"] - told["begin_ms"] == 1300


def test_the_members_of_a_clip_stand_in_order_and_clips_are_not_mixed(packing: PackConfig) -> None:
    pack(packing)
    names = list(members_of(packing.output))
    keys = [name.split(".")[0] for name in names[::4]]
    assert names == [f"{key}.{suffix}" for key in keys for suffix in ("cls", "frames.mp", "json", "keypoints.mp")]


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_index_points_at_exactly_the_frames_bytes(codec: str, packing: PackConfig) -> None:
    pack(replace(packing, codec=codec))
    members = members_of(packing.output)
    num_frames = 0
    for path in sorted(packing.output.rglob("*.index.mp")):
        tar = (path.parent / path.name.replace(".index.mp", ".tar")).read_bytes()
        index = unpack_index(path.read_bytes())
        assert hashlib.sha256(tar).hexdigest() == index.tar_sha256 and len(tar) == index.tar_bytes
        for entry in index.clips:
            assert list(entry.members) == ["cls", "frames.mp", "json", "keypoints.mp"]
            assert entry.video_sha256 == json.loads(members[f"{entry.facts.key}.json"])["arrays"]["video"]["sha256"]
            assert entry.crc32 == {suffix: zlib.crc32(members[f"{entry.facts.key}.{suffix}"]) for suffix in entry.members}
            for suffix, (offset, size) in entry.members.items():
                assert tar[offset : offset + size] == members[f"{entry.facts.key}.{suffix}"]
            frames = msgpack.unpackb(members[f"{entry.facts.key}.frames.mp"])
            assert [tar[r["offset"] : r["offset"] + r["size"]] for r in entry.frames] == frames["frames"]
            assert frames["crc32"] == entry.frames["crc32"].tolist()
            assert entry.facts.frames_valid == json.loads(members[f"{entry.facts.key}.json"])["frames_valid"]
            num_frames += len(frames["frames"])
    assert num_frames == 10 * 8


def test_jpeg_frames_are_the_source_as_pillow_sees_it(packing: PackConfig) -> None:
    manifest = pack_all(replace(packing, codec="jpeg", quality=95))
    assert (manifest.codec, manifest.codec_settings) == ("jpeg", {"quality": 95})
    import io

    for name, blob in members_of(packing.output).items():
        if name.endswith("frames.mp"):
            video = source_of(packing.dataset_home, name.split(".")[0])["video"]
            for frame, expected in zip(msgpack.unpackb(blob)["frames"], video, strict=True):
                assert abs(np.asarray(Image.open(io.BytesIO(frame))).astype(int) - expected).mean() < 8


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_webdataset_alone_reads_the_shards(packing: PackConfig) -> None:
    import webdataset

    pack(packing)
    urls = sorted(map(str, (packing.output / "train").glob("*.tar")))
    clips = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(clips) == 8
    for clip in clips:
        arrays = source_of(packing.dataset_home, clip["__key__"])
        frames = b"".join(zstandard.ZstdDecompressor().decompress(frame) for frame in clip["frames.mp"]["frames"])
        assert clip["frames.mp"]["shape"] == list(arrays["video"].shape) and frames == arrays["video"].tobytes()
        points = np.frombuffer(clip["keypoints.mp"]["points"], "<u2").reshape(-1, 3)
        assert np.array_equal(points, np.argwhere(arrays["keypoints"]))
        assert clip["cls"] == int("/gesture/" in clip["__key__"]) and clip["json"]["path"] == clip["__key__"] + ".npz"


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_reader_in_the_documentation_reads_the_shards(codec: str, packing: PackConfig) -> None:
    pack(replace(packing, codec=codec))
    text = (Path(__file__).parent.parent / "docs/format.md").read_text(encoding="utf-8")
    program = text.split("```python\n")[1].split("```")[0].replace('"OUT"', repr(str(packing.output)))
    found: list[tuple[str, int, bytes]] = []
    exec(program.replace("assert zlib", "found.append((clip['key'], t, frame)); assert zlib"), {"found": found})
    members = members_of(packing.output / "train")
    keys = [name.removesuffix(".cls") for name in members if name.endswith(".cls")]
    expected = []
    for key in keys:
        frames = msgpack.unpackb(members[f"{key}.frames.mp"])["frames"]
        expected += [(key, t, frame) for t, frame in enumerate(frames[: json.loads(members[f"{key}.json"])["frames_valid"]])]
    assert found == expected and len(expected) > 50


def test_smaller_frames_are_stored_and_keypoints_stay_in_source_coordinates(tmp_path: Path, in_threads: None) -> None:
    home = write_home(tmp_path, {"train": {"a": 1}}, frames=2, height=32, width=48)
    grey_noise = np.random.RandomState(0).randint(0, 256, (2, 32, 48, 1), dtype=np.uint8).repeat(3, axis=3)  # grey: nothing is lost to 4:2:0
    rewrite(snippets_of(home)[0], video=grey_noise)
    manifest = pack_all(PackConfig(home, tmp_path / "out", store_size=16, quality=100, workers=1))
    assert (manifest.source, manifest.stored) == (ClipSpec(2, 32, 48), ClipSpec(2, 16, 24))
    members = members_of(tmp_path / "out")
    key = next(iter(members)).split(".")[0]
    arrays, frames = source_of(home, key), msgpack.unpackb(members[f"{key}.frames.mp"])
    assert frames["shape"] == [2, 16, 24, 3]
    assert np.array_equal(mask_by_hand(members[f"{key}.keypoints.mp"]), arrays["keypoints"])
    jpeg, out = make_codec("jpeg"), np.empty((16, 24, 3), np.uint8)
    for frame, whole in zip(frames["frames"], arrays["video"], strict=True):
        jpeg.decode(frame, out)
        smaller = Image.fromarray(whole).resize((24, 16), Image.Resampling.BICUBIC)
        assert abs(out.astype(int) - np.asarray(smaller)).max() <= 3


def test_keypoints_optional_leaves_the_member_out_where_there_is_no_mask(packing: PackConfig) -> None:
    lacking = snippets_of(packing.dataset_home)[0]
    rewrite(lacking, keypoints=None)
    pack(replace(packing, keypoints="optional"))
    without = {name.split(".")[0] for name in members_of(packing.output)}
    without -= {name.split(".")[0] for name in members_of(packing.output) if name.endswith(".keypoints.mp")}
    assert without == {lacking.relative_to(packing.dataset_home).as_posix().removesuffix(".npz")}


def test_keypoints_none_packs_no_mask_at_all(packing: PackConfig) -> None:
    rewrite(snippets_of(packing.dataset_home)[0], keypoints=np.full((1, 1), 9.5))  # not looked at
    manifest = pack_all(replace(packing, keypoints="none"))
    assert not [name for name in members_of(packing.output) if "keypoints" in name]
    assert manifest.arrays["keypoints_mode"] == "none"


def test_extras_are_asked_for_kept_bit_exact_or_dropped(packing: PackConfig) -> None:
    flow = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 6), dtype=np.uint8)
    with_flow = snippets_of(packing.dataset_home)[0]
    rewrite(with_flow, video_OF=flow, fps=np.array(29.97))
    assert "snippets also hold fps, video_OF. Say --extras keep (stored bit-exact) or --extras drop." in refused(packing)
    dropped = pack_all(replace(packing, extras="drop", output=packing.output / "drop"))
    assert dropped.arrays["dropped"] == ["fps", "video_OF"] and len(members_of(packing.output / "drop")) == 40
    kept = pack_all(replace(packing, extras="keep", output=packing.output / "keep"))
    assert kept.arrays["kept"] == ["fps", "video_OF"] and kept.arrays["dropped"] == []
    members = members_of(packing.output / "keep")
    key = with_flow.relative_to(packing.dataset_home).as_posix().removesuffix(".npz")
    assert [name for name in members if ".fps" in name or ".video_OF" in name] == [f"{key}.fps.mp", f"{key}.video_OF.mp"]
    for name, expected in (("video_OF", flow), ("fps", np.array(29.97))):
        packed = msgpack.unpackb(members[f"{key}.{name}.mp"])
        assert (packed["dtype"], packed["shape"]) == (expected.dtype.str, list(expected.shape))
        assert zstandard.ZstdDecompressor().decompress(packed["zstd"]) == expected.tobytes()
        assert json.loads(members[f"{key}.json"])["arrays"][name]["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["frames", "json", "cls", "a.b"])
def test_an_array_that_cannot_be_a_member_is_refused_when_kept(name: str, packing: PackConfig) -> None:
    rewrite(snippets_of(packing.dataset_home)[0], **{name: np.arange(3)})
    assert f"arrays named {name} cannot be members" in refused(replace(packing, extras="keep"))
    pack(replace(packing, extras="drop"))


def test_arrays_may_have_other_names(tmp_path: Path, in_threads: None) -> None:
    home = tmp_path / "home"
    (home / "train/a").mkdir(parents=True)
    video, mask = tell_tale_video(1, 4, 16, 16), tell_tale_mask(1, 4, 16, 16)
    np.savez_compressed(home / "train/a/1_x.npz", frames=video, joints=mask)
    config = PackConfig(home, tmp_path / "out", codec="zstd", workers=1)
    assert "frames uint8 (4, 16, 16, 3), joints uint8 (4, 16, 16). Name the array with --video-key." in refused(config)
    manifest = pack_all(replace(config, video_key="frames", keypoints_key="joints"))
    members = members_of(tmp_path / "out")
    assert (manifest.arrays["video"], manifest.arrays["keypoints"]) == ("frames", "joints")
    assert np.array_equal(zstd_video(members["train/a/1_x.frames.mp"]), video)
    assert np.array_equal(mask_by_hand(members["train/a/1_x.keypoints.mp"]), mask)


def test_three_classes_have_the_asked_order(tmp_path: Path, in_threads: None, caplog: pytest.LogCaptureFixture) -> None:
    home = write_home(tmp_path, {"train": {"wave": 2, "nod": 2, "rest": 1}, "val": {"nod": 1}}, frames=2, height=8, width=8)
    caplog.set_level(logging.INFO)
    sorted_ones = pack_all(PackConfig(home, tmp_path / "sorted", workers=1))
    assert "val: holds no clip of rest, wave" in caplog.text
    asked = pack_all(PackConfig(home, tmp_path / "asked", workers=1, classes=("rest", "wave", "nod")))
    assert sorted_ones.classes == ("nod", "rest", "wave") and asked.classes == ("rest", "wave", "nod")
    for manifest, folder in ((sorted_ones, "sorted"), (asked, "asked")):
        labels = {name.split("/")[1]: int(blob) for name, blob in members_of(tmp_path / folder).items() if name.endswith(".cls")}
        assert labels == {name: label for label, name in enumerate(manifest.classes)}
    per_class = np.sum([shard.clips_per_class for shard in asked.splits["train"].shards], axis=0)
    assert per_class.tolist() == [1, 2, 2]


def test_keys_with_dots_spaces_other_letters_and_great_length_are_read_by_tar(tmp_path: Path, in_threads: None) -> None:
    home = write_home(tmp_path, {"train": {"a": 1}}, frames=2, height=8, width=8, name="other home")
    (made,) = snippets_of(home)
    names = ["1_a.b c.npz", "2_émission ☺.npz", f"3_{'long' * 50}.npz"]
    for name in names:
        shutil.copy(made, made.with_name(name))
    made.unlink()
    manifest = pack_all(PackConfig(home, tmp_path / "out", workers=1))
    found = {name.removesuffix(".cls") for name in members_of(tmp_path / "out") if name.endswith(".cls")}
    assert found == {"train/a/1_a_b c", "train/a/2_émission ☺", f"train/a/3_{'long' * 50}"}
    assert manifest.home == {"folder": "other home"}
    for path in (tmp_path / "out").rglob("*.index.mp"):
        tar = path.with_name(path.name.replace(".index.mp", ".tar")).read_bytes()
        for entry in unpack_index(path.read_bytes()).clips:
            assert all(tar[r["offset"] : r["offset"] + 2] == b"\xff\xd8" for r in entry.frames)  # a JPEG starts there
