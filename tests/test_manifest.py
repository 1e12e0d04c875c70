"""manifest.json and the index that it names: what comes back, and what is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clips.clip import ClipSpec
from clips.errors import ClipError, InputError
from clips.manifest import (
    Leaks,
    Manifest,
    ShardEntry,
    SplitEntry,
    fingerprint,
    index_path,
    is_packed,
    read_index,
    read_manifest,
    write_manifest,
)
from convert.writer import write_shard
from tests.test_format import assert_same, hand_made

SHARD = ShardEntry("train-000000", 5, 10240, "a" * 64, "b" * 64, (2, 3))
MANIFEST = Manifest(
    codec="jpeg",
    codec_settings={"quality": 90},
    source=ClipSpec(39, 320, 320),
    stored=ClipSpec(39, 256, 256),
    classes=("nongesture", "gesté"),
    home={"folder": "x_length_1300_iou_0.5", "name": "x", "length_ms": 1300, "iou": 0.5},
    arrays={"video": "video", "keypoints": "keypoints", "keypoints_mode": "required", "kept": [], "dropped": ["flow"]},
    source_pattern="^x$",
    leaks=Leaks([["train/a/1_x", "val/a/1_x"]], {"x": ["train", "val"]}, [["train/a/2_x", "val/a/2_x"]]),
    splits={"train": SplitEntry("f" * 64, (SHARD, replace(SHARD, name="train-000001", clips=4)), ({"path": "train/a/3_x.npz", "reason": "cut"},))},
)


def test_a_manifest_comes_back_and_is_plain_json(tmp_path: Path) -> None:
    assert not is_packed(tmp_path)
    write_manifest(tmp_path, MANIFEST)
    assert is_packed(tmp_path) and read_manifest(tmp_path) == MANIFEST
    packed = json.loads((tmp_path / "manifest.json").read_bytes().decode("utf-8"))
    assert packed["format"] == 1 and packed["stored"] == {"frames": 39, "height": 256, "width": 256}
    assert packed["splits"]["train"]["shards"][0] == {
        "name": "train-000000",
        "clips": 5,
        "tar_bytes": 10240,
        "tar_sha256": "a" * 64,
        "index_sha256": "b" * 64,
        "clips_per_class": [2, 3],
    }
    assert MANIFEST.splits["train"].num_clips == 9
    first = (tmp_path / "manifest.json").read_bytes()
    write_manifest(tmp_path, MANIFEST)
    assert (tmp_path / "manifest.json").read_bytes() == first and len(list(tmp_path.iterdir())) == 1


def test_unknown_fields_of_a_manifest_are_ignored(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    packed = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    for place in (packed, packed["source"], packed["leaks"], packed["splits"]["train"], packed["splits"]["train"]["shards"][0]):
        place["later"] = 1
    (tmp_path / "manifest.json").write_text(json.dumps(packed), encoding="utf-8")
    assert read_manifest(tmp_path) == MANIFEST


def test_a_missing_manifest_says_that_packing_did_not_end(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest.json: missing; expected shards that were packed to the end"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"format": 1}', b'{"format": 1, "codec": 3', b"[]", b"null"])
def test_a_damaged_manifest_is_one_clear_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(InputError, match=r"manifest.json: ") as error:
        read_manifest(tmp_path)
    assert "\n" not in str(error.value)


ABSENT = ["codec", "codec_settings", "source", "stored", "classes", "home", "arrays", "source_pattern", "leaks", "splits"]
WRONG: list[tuple[str, Any]] = [("source", 3), ("stored", {"frames": 0, "height": 1, "width": 1}), ("classes", 3), ("splits", 3), ("splits", {"train": 3})]
WRONG += [("leaks", []), ("leaks", {"identical": []})]


@pytest.mark.parametrize(("name", "value"), [*((name, None) for name in ABSENT), *WRONG])
def test_a_manifest_with_a_missing_or_wrong_field_is_one_clear_line(name: str, value: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    packed = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) | {name: value}
    if value is None:
        del packed[name]
    (tmp_path / "manifest.json").write_text(json.dumps(packed), encoding="utf-8")
    with pytest.raises(InputError, match="a field is missing or wrong"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match=r"format version 2; this program reads version 1\. Use the program that packed it, or pack again\."):
        read_manifest(tmp_path)


def test_an_index_that_is_not_the_manifests_is_a_clip_error(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    index = write_shard(tmp_path, "train", SHARD.name, "id", [hand_made()])
    path = index_path(tmp_path, "train", SHARD.name)
    blob = path.read_bytes()
    shard = replace(SHARD, index_sha256=hashlib.sha256(blob).hexdigest())
    assert_same(read_index(tmp_path, "train", shard), index)
    path.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(ClipError, match=r"train-000000.index.mp: sha256 is not the manifest's"):
        read_index(tmp_path, "train", shard)
    path.unlink()
    with pytest.raises(ClipError, match=r"train-000000.index.mp: cannot be read"):
        read_index(tmp_path, "train", shard)
    path.write_bytes(b"\x80")
    with pytest.raises(ClipError, match="an index of format version None"):
        read_index(tmp_path, "train", replace(shard, index_sha256=hashlib.sha256(b"\x80").hexdigest()))


def test_settings_are_all_but_splits_leaks_and_the_homes_folder() -> None:
    assert MANIFEST.settings().keys() == {"format", "codec", "codec_settings", "source", "stored", "classes", "home", "arrays", "source_pattern"}
    moved = replace(MANIFEST, splits={}, leaks=Leaks(), home=MANIFEST.home | {"folder": "elsewhere"})
    assert moved.settings() == MANIFEST.settings() and "folder" not in MANIFEST.settings()["home"]
    assert replace(MANIFEST, home=MANIFEST.home | {"length_ms": 2600}).settings() != MANIFEST.settings()


def test_the_fingerprint_of_data_is_of_sorted_keys_and_labels() -> None:
    expected = hashlib.sha256(b"a\t1\nb\t0\n").hexdigest()
    assert fingerprint(["b", "a"], [0, 1]) == fingerprint(["a", "b"], [1, 0]) == expected
    assert fingerprint(["a", "b"], [0, 1]) != expected
