"""One small data set as npz and as shards of several kinds, made once a session, and loaders over it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from clips.clip import ClipSpec
from clips.format import IndexEntry
from clips.manifest import read_index, read_manifest, tar_path
from convert.pack import PackConfig, pack
from loaders.batch import Batch
from loaders.plan import Plan
from loaders.sample import AugmentConfig
from loaders.source import ClipSource, open_source
from loaders.stream import LOOK_AHEAD, DecodeIn, Loader
from tests import by_hand
from tests.making import write_home

STORED = ClipSpec(9, 24, 32)
COUNTS = {"train": {"gesture": 9, "nongesture": 12}, "val": {"gesture": 3, "nongesture": 4}}
MANY_SHARDS_MIB, ONE_SHARD_MIB = 0.07, 16.0  # three to five clips a shard; all of them
SEED = 3
CROP = ClipSpec(5, 12, 16)
CROP_ALONE = AugmentConfig(crop_scale=(0.25, 0.25), crop_ratio=(4 / 3, 4 / 3))  # of 24x32 always 12x16: nothing is left to resize

Found = dict[str, tuple[np.ndarray, np.ndarray, int]]  # key to video, mask and label


@cache
def npz_home(base: Path) -> Path:
    """The snippets, below pytest's base folder: every fourth ends in two frames of zeros, every fifth has no keypoints."""
    home = write_home(base / "snippets", COUNTS, STORED.frames, STORED.height, STORED.width, padded_every=4)
    for path in sorted(home.rglob("*.npz"))[::5]:
        with np.load(path) as arrays:
            video = arrays["video"]
        np.savez_compressed(path, video=video)
    return home


@cache
def shards(base: Path, codec: str, shard_mib: float, store_size: int | None = None) -> Path:
    output = base / f"shards-{codec}-{shard_mib}-{store_size}"
    pack(PackConfig(npz_home(base), output, codec, store_size=store_size, workers=1, shard_mib=shard_mib, keypoints="optional"))
    return output


def home_for(base: Path, loader: str) -> Path:
    """A folder that the loader reads without any loss: snippets for npz, shards for every other; skips the test where the loader is not installed."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    return npz_home(base) if loader == "npz" else shards(base, "zstd", MANY_SHARDS_MIB)


def keys_of(home: Path, split: str = "train") -> list[str]:
    """The keys of a folder of snippets in their order, from the file names alone."""
    return sorted((path.relative_to(home).as_posix().removesuffix(".npz") for path in (home / split).rglob("*.npz")), key=str.encode)


@contextmanager
def opened(
    home: Path,
    loader: str = "auto",
    split: str = "train",
    spec: ClipSpec = CROP,
    batch_size: int = 4,
    micro_batch: int = 2,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 2,
    prefetch: int = 2,
    subset: list[int] | None = None,
    augment: AugmentConfig | None = CROP_ALONE,
    with_points: bool = True,
    look_ahead: int = LOOK_AHEAD,
    decode_in: DecodeIn = "auto",
    stage_dir: Path | None = None,
    max_bad_clips: int = 0,
    around: Callable[[ClipSource], ClipSource] = lambda source: source,
) -> Iterator[Loader]:
    """A loader on the CPU, closed at the end; `around` may put another source around the one that reads."""
    with closing(around(open_source(home, split, loader))) as source:
        plan = Plan(len(subset if subset is not None else source.facts), batch_size, micro_batch, SEED, rank, world_size)
        reading = (with_points, look_ahead, decode_in, stage_dir, max_bad_clips)
        with closing(Loader(source, plan, spec, torch.device("cpu"), threads, prefetch, subset, augment, *reading)) as made:
            yield made


def keys_in(batches: Iterable[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.key]


def by_key(batches: Iterable[Batch]) -> Found:
    """Key to video, mask and label; a key that comes twice is an error."""
    found: Found = {}
    for batch in batches:
        assert batch.keypoints is not None
        for place, key in enumerate(batch.key):
            assert key not in found
            found[key] = (batch.video[place].numpy(), batch.keypoints[place].numpy(), int(batch.label[place]))
    return found


def assert_same(one: Found, other: Found) -> None:
    assert list(one) == list(other)
    for key, (video, mask, label) in one.items():
        np.testing.assert_array_equal(video, other[key][0], key)
        np.testing.assert_array_equal(mask, other[key][1], key)
        assert label == other[key][2]


def expected_clip(home: Path, key: str, spec: ClipSpec, epoch: int | None, augment: AugmentConfig = CROP_ALONE) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, h, w, 3) cut and flipped but not resized, and mask (T, H, W) of `spec`; an epoch of None is evaluation."""
    with np.load(home / f"{key}.npz") as arrays:
        video, mask = arrays["video"], arrays.get("keypoints", np.zeros(STORED.mask_shape, np.uint8))
    valid = max(frame for frame in range(len(video)) if video[frame].any()) + 1
    top, left, height, width, flip = 0, 0, STORED.height, STORED.width, False
    frame_draws = None
    if epoch is not None:
        frame_draws = by_hand.uniforms(spec.frames, "frames", SEED, epoch, key, 0)
        view_draws = by_hand.uniforms(41, "view", SEED, epoch, key, 0)
        top, left, height, width, flip = by_hand.view(STORED.height, STORED.width, view_draws, augment.crop_scale, augment.crop_ratio, 0.5)
    chosen = by_hand.frames(spec.frames, valid, frame_draws)
    frames = video[chosen, top : top + height, left : left + width]
    points = [(place, int(y), int(x)) for place, frame in enumerate(chosen) for y, x in zip(*np.nonzero(mask[frame]), strict=True)]
    whole = (STORED.height, STORED.width)
    drawn = by_hand.mask(points, (top, left, height, width), flip, whole, whole, spec.mask_shape)
    return (frames[:, :, ::-1] if flip else frames), drawn


def find_entry(home: Path, key: str, split: str = "train") -> tuple[Path, IndexEntry]:
    """The tar that holds the clip, and its entry."""
    for shard in read_manifest(home).splits[split].shards:
        for entry in read_index(home, split, shard).clips:
            if entry.facts.key == key:
                return tar_path(home, split, shard.name), entry
    raise AssertionError(key)


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x55]))


def decoding_processes(parent: int | None = None) -> list[int]:
    """The living children of this or another process that decode, as the system knows them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_child = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == (parent or os.getpid())
            if is_child and b"loaders.beside" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def digests_of_rank(home: Path, rank: int, world_size: int) -> dict[str, str]:
    """Key to sha256 of the video of a rank's clips of an epoch; run in a process of its own."""
    with opened(home, rank=rank, world_size=world_size) as made:
        return {key: hashlib.sha256(video.tobytes()).hexdigest() for key, (video, _, _) in by_key(made.training(0)).items()}


def assert_same_beside_pixels(ours: Batch, theirs: Batch) -> None:
    """Two loaders' batches of the same clips, wherever they lie: all but the video is equal."""
    assert ours.keypoints is not None and theirs.keypoints is not None
    assert torch.equal(ours.keypoints.cpu(), theirs.keypoints.cpu())
    assert torch.equal(ours.label.cpu(), theirs.label.cpu()) and torch.equal(ours.weight.cpu(), theirs.weight.cpu())
    assert (ours.key, ours.position, ours.labels, ours.proof) == (theirs.key, theirs.position, theirs.labels, theirs.proof)
