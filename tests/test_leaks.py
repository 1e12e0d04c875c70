"""What makes val or test too easy: found, listed in the manifest and warned of, never in the way."""

from __future__ import annotations

import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clips.format import ClipFacts, IndexEntry
from clips.manifest import Leaks, read_manifest
from convert import leaks
from convert.encode import dhash
from convert.leaks import NEAR_BITS
from convert.pack import PackConfig, pack
from tests.making import tell_tale_mask
from tests.packing import use_threads


def scene(number: int, frames: int = 6, size: int = 64) -> np.ndarray:
    """uint8 (T, H, W, 3): a smooth picture of its own with a bright patch that moves."""
    chance = np.random.RandomState(number)
    small = Image.fromarray(chance.randint(0, 256, (7, 7, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    video = np.repeat(np.asarray(small)[None], frames, axis=0).copy()
    for t in range(frames):
        y, x = chance.randint(0, size - 12, 2)
        video[t, y : y + 12, x : x + 12] = chance.randint(0, 256, 3)
    return video


def recompressed(video: np.ndarray, quality: int) -> np.ndarray:
    """What is left of each frame after a JPEG of that quality."""
    frames = []
    for frame in video:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, "JPEG", quality=quality)
        frames.append(np.asarray(Image.open(stream)))
    return np.stack(frames)


def noisy(video: np.ndarray, most: int = 3) -> np.ndarray:
    noise = np.random.RandomState(1).randint(-most, most + 1, video.shape)
    return (video.astype(int) + noise).clip(0, 255).astype(np.uint8)


def entry(split: str, name: str, video: np.ndarray, source: str = "") -> IndexEntry:
    facts = ClipFacts(f"{split}/a/{name}", 0, source or name, None, None, None, len(video))
    import hashlib

    return IndexEntry(facts, hashlib.sha256(video.tobytes()).hexdigest(), dhash(video), 0, {}, {}, np.empty(0))


def save(home: Path, path: str, video: np.ndarray) -> Path:
    (home / path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(home / path, video=video, keypoints=tell_tale_mask(0, *video.shape[:3]))
    return home / path


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    """Four scenes in train, two others in val, no leak."""
    use_threads(monkeypatch)
    for number in range(6):
        save(tmp_path / "home", f"{'train' if number < 4 else 'val'}/a/{number:09d}_film{number}.npz", scene(number))
    return PackConfig(tmp_path / "home", tmp_path / "out", shard_mib=0.05, workers=2, near_duplicates=True)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_without_leaks_nothing_is_said(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    manifest = pack(packing)
    assert manifest is not None and manifest.leaks == Leaks([], {}, []) and warnings_of(caplog) == []


def test_identical_clips_in_two_splits_are_listed_and_warned_of(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    home = packing.dataset_home
    shutil.copy(home / "train/a/000000001_film1.npz", home / "val/a/000000009_renamed.npz")
    np.savez(home / "val/a/000000010_stored.npz", video=scene(2), keypoints=tell_tale_mask(5, 6, 64, 64))  # other bytes in the file, the same video
    shutil.copy(home / "train/a/000000003_film3.npz", home / "train/a/000000011_twice.npz")  # inside a split: no leak
    manifest = pack(packing)
    assert manifest is not None
    assert manifest.leaks.identical == [["train/a/000000001_film1", "val/a/000000009_renamed"], ["train/a/000000002_film2", "val/a/000000010_stored"]]
    assert manifest.leaks.near == []  # what is identical is told once
    assert json.loads((packing.output / "manifest.json").read_text())["leaks"]["identical"] == manifest.leaks.identical
    (line,) = warnings_of(caplog)
    assert line.startswith("leak: 2 clips in several splits with equal bytes, train/a/000000001_film1 and val/a/000000009_renamed first")


def test_a_source_in_two_splits_is_listed_and_warned_of(packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    save(packing.dataset_home, "val/a/000000007_film0.npz", scene(20))
    save(packing.dataset_home, "test/a/000000008_film0.npz", scene(21))
    save(packing.dataset_home, "test/a/000000008_film4.npz", scene(22))
    manifest = pack(packing)
    assert manifest is not None and manifest.leaks == Leaks([], {"film0": ["test", "train", "val"], "film4": ["test", "val"]}, [])
    (line,) = warnings_of(caplog)
    assert line.startswith("leak: 2 sources in several splits, 'film0' in test and train and val first")


@pytest.mark.parametrize("kind", ["quality 50", "noise"])
def test_a_near_copy_is_found_when_asked_for(kind: str, packing: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    copy = recompressed(scene(3), 50) if kind == "quality 50" else noisy(scene(3))
    save(packing.dataset_home, "val/a/000000009_other.npz", copy)
    quiet = pack(replace(packing, near_duplicates=False))
    assert quiet is not None and quiet.leaks.near is None and warnings_of(caplog) == []
    manifest = pack(packing)
    assert manifest is not None and manifest.leaks.near == [["train/a/000000003_film3", "val/a/000000009_other"]]
    assert read_manifest(packing.output) == manifest
    (line,) = warnings_of(caplog)
    assert line.startswith("leak: 1 pair of clips of different splits that look nearly alike, train/a/000000003_film3 and val/a/000000009_other first")


def test_copies_of_many_scenes_are_found_and_nothing_else() -> None:
    train = [entry("train", str(number), scene(number)) for number in range(60)]
    val = [entry("val", str(number), recompressed(scene(number), 50)) for number in range(30)]
    test = [entry("test", str(number), noisy(scene(number))) for number in range(30, 60)]
    expected = [[f"train/a/{number}", f"val/a/{number}"] for number in range(30)] + [[f"test/a/{number}", f"train/a/{number}"] for number in range(30, 60)]
    assert leaks.near({"train": train, "val": val, "test": test}) == sorted(expected)


def flipped(bits: int) -> bytes:
    blob = bytearray(24)
    for bit in range(bits):
        blob[(bit * 7) % 24] |= 1 << (bit * 7 // 24 % 8)
    assert sum(bin(byte).count("1") for byte in blob) == bits
    return bytes(blob)


@pytest.mark.parametrize(("bits", "near"), [(0, True), (NEAR_BITS, True), (NEAR_BITS + 1, False), (24, False)])
def test_the_border_is_a_number_of_bits(bits: int, near: bool) -> None:
    one = entry("train", "1", scene(1))
    a, b = replace(one, dhash=bytes(24)), replace(entry("val", "2", scene(2)), dhash=flipped(bits))
    assert leaks.near({"train": [a], "val": [b]}) == ([["train/a/1", "val/a/2"]] if near else [])


def test_more_clips_than_are_compared_at_once_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "CHUNK", 3)
    train = [entry("train", str(number), scene(number)) for number in range(8)]
    val = [entry("val", str(number), noisy(scene(number), 1)) for number in (7, 2)]
    assert leaks.near({"train": train, "val": val, "test": []}) == [["train/a/2", "val/a/2"], ["train/a/7", "val/a/7"]]
