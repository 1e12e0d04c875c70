"""The least that a loader on shards can cost: the same frames by the same decoder in as many threads, and nothing else.

floor:      JPEG bytes that lie in memory already -> decode into one buffer a thread that every clip overwrites
floor+read: one preadv a clip -> crc32 of each frame -> the same
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clips.codecs import make_codec
from clips.errors import InputError
from clips.manifest import read_index, read_manifest, tar_path
from loaders.sample import frames_uniform, training_draws

SEED, EPOCH = 0, 0  # of every pass of every loader: all decode the same frames


@dataclass(frozen=True)
class ChosenFrames:
    """A clip in its tar: where the frames that the epoch takes lie (T,), their offsets not descending."""

    key: str
    tar: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class PassClips:
    """Whole shards of a split, each as often as `times`: what every way reads in one pass."""

    home: Path
    split: str
    tars: tuple[Path, ...]
    clips: tuple[ChosenFrames, ...]
    times: int

    @property
    def num_clips(self) -> int:
        return len(self.clips) * self.times


def pass_clips(home: Path, split: str, frames: int, least: int, workers: int) -> PassClips:
    """At least `least` clips: the split's first shards, or all of them several times; `workers` that deal out the tars have equally many."""
    manifest = read_manifest(home)
    if split not in manifest.splits:
        raise InputError(f"--split {split}: {home} holds {', '.join(manifest.splits)}.")
    tars: list[Path] = []
    clips: list[ChosenFrames] = []
    for shard in manifest.splits[split].shards:
        tars.append(tar_path(home, split, shard.name))
        for entry in read_index(home, split, shard).clips:
            draws, _ = training_draws(frames, SEED, EPOCH, entry.facts.key)
            records = entry.frames[frames_uniform(frames, entry.facts.frames_valid, draws)]
            offsets, sizes, crc32 = (tuple(records[name].tolist()) for name in ("offset", "size", "crc32"))
            clips.append(ChosenFrames(entry.facts.key, tars[-1], offsets, sizes, crc32))
        if len(clips) >= least:
            break
    if not clips:
        raise InputError(f"--split {split}: {home} holds no clips of it. Measure on another split.")
    alike = workers // math.gcd(workers, len(tars))  # so many rounds over the tars give each worker the same number of them
    return PassClips(home, split, tuple(tars), tuple(clips), -(-least // (len(clips) * alike)) * alike)


class Floor:
    """One pass a call of `clips`; with `reading` the bytes come from the tars each time."""

    def __init__(self, chosen: PassClips, threads: int, reading: bool) -> None:
        manifest = read_manifest(chosen.home)
        self._codec = make_codec(manifest.codec, manifest.codec_settings)
        self._files = {tar: os.open(tar, os.O_RDONLY) for tar in chosen.tars}
        self._chosen, self._threads, self._reading = chosen, threads, reading
        self._blobs = {} if reading else {clip.key: self._read(clip) for clip in chosen.clips}
        height, width, length = manifest.stored.height, manifest.stored.width, len(chosen.clips[0].offsets)
        self._buffers = [np.ones((length, height, width, 3), np.uint8) for _ in range(threads)]  # written: the system gives the memory now

    def clips(self) -> Iterator[int]:
        """The number of decoded clips, once, when all are."""
        everything = self._chosen.clips * self._chosen.times
        with ThreadPoolExecutor(self._threads) as pool:
            yield sum(pool.map(self._decode, (everything[thread :: self._threads] for thread in range(self._threads)), self._buffers))

    def _decode(self, clips: Sequence[ChosenFrames], buffer: np.ndarray) -> int:
        for clip in clips:
            for blob, out in zip(self._read(clip) if self._reading else self._blobs[clip.key], buffer, strict=True):
                self._codec.decode(blob, out)
        return len(clips)

    def _read(self, clip: ChosenFrames) -> list[memoryview]:
        begin = clip.offsets[0]
        span = memoryview(bytearray(clip.offsets[-1] + clip.sizes[-1] - begin))
        os.preadv(self._files[clip.tar], [span], begin)
        blobs = [span[offset - begin :][:size] for offset, size in zip(clip.offsets, clip.sizes, strict=True)]
        for blob, crc32 in zip(blobs, clip.crc32, strict=True):
            if zlib.crc32(blob) != crc32:
                raise InputError(f"{clip.tar}: clip '{clip.key}' has another crc32 than its index. Run python -m convert verify {self._chosen.home}.")
        return blobs

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
