"""Clips out of shards, by offset: the index says where each frame lies, preadv fetches the chosen ones, their crc32 is checked.

Never mapped: a file cut short under a mapping ends the process, a short pread is an error that names the clip.
"""

from __future__ import annotations

import errno
import os
import resource
import zlib
from pathlib import Path

import numpy as np

from clips.codecs import make_codec
from clips.errors import ClipError, InputError
from clips.format import IndexEntry, unpack_points
from clips.manifest import read_index, read_manifest, tar_path

from .source import ChooseFrames, Loaded

SPARE_FILES = 512  # for everything else that a training opens


class ShardSource:
    """A split of a folder that `python -m convert pack` wrote."""

    def __init__(self, home: Path, split: str) -> None:
        manifest = read_manifest(home)
        if split not in manifest.splits:
            raise InputError(f"--dataset-home {home}: no split {split}; its shards hold {', '.join(manifest.splits)}.")
        self.class_names, self.stored, self.source = manifest.classes, manifest.stored, manifest.source
        self._codec = make_codec(manifest.codec, manifest.codec_settings)
        self._paths: list[Path] = []
        self._files: list[int] = []
        entries: list[tuple[IndexEntry, int]] = []
        _allow_open_files(len(manifest.splits[split].shards))
        try:
            for shard in manifest.splits[split].shards:
                index = read_index(home, split, shard)
                self._open(tar_path(home, split, shard.name), shard.tar_bytes)
                entries += [(entry, len(self._paths) - 1) for entry in index.clips]
        except BaseException:
            self.close()
            raise
        entries.sort(key=lambda pair: pair[0].facts.key.encode())
        self._entries = entries
        self.facts = [entry.facts for entry, _ in entries]
        self._kind = f"{manifest.codec} {manifest.codec_settings}"

    def _open(self, path: Path, tar_bytes: int) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise InputError(f"{path}: too many open files; each shard stays open. Type: ulimit -n {len(self._paths) + SPARE_FILES}") from error
            raise ClipError(f"{path}: cannot be opened ({error.strerror}). Run python -m convert verify {path.parent.parent}.") from error
        self._paths.append(path)
        self._files.append(descriptor)
        if (found := os.fstat(descriptor).st_size) != tar_bytes:
            raise ClipError(f"{path}: {found} bytes; the manifest promises {tar_bytes}. Copy it again, or run python -m convert verify.")

    def describe(self) -> list[str]:
        return [f"{len(self.facts)} clips in {len(self._paths)} shards, {self._kind}, frames stored as {self.stored}"]

    def load(self, number: int, choose: ChooseFrames, out: np.ndarray, with_points: bool) -> Loaded:
        entry, shard = self._entries[number]
        chosen = choose(entry.facts.frames_valid)
        blobs = dict(zip(chosen.tolist(), self._frames(entry, shard, chosen), strict=True))
        for place, frame in enumerate(chosen.tolist()):
            try:
                self._codec.decode(blobs[frame], out[place])
            except ValueError as error:
                raise self._error(entry, shard, "frames.mp", f"frame {frame} does not decode ({error})") from error
        points = self._points(entry, shard, chosen) if with_points else None
        return Loaded(entry.facts.key, entry.facts.label, points)

    def _frames(self, entry: IndexEntry, shard: int, chosen: np.ndarray) -> list[memoryview]:
        """The chosen frames' bytes, one read from the first to the last: at 16 of 39 frames that is one seek for 0.7 MB."""
        records = entry.frames[chosen]
        begin = int(records["offset"][0])
        size = int(records["offset"][-1]) + int(records["size"][-1]) - begin
        span = memoryview(self._read(entry, shard, "frames.mp", begin, size))
        blobs = []
        for frame, offset, length, crc32 in zip(chosen, records["offset"], records["size"], records["crc32"], strict=True):
            blob = span[int(offset) - begin : int(offset) - begin + int(length)]
            if zlib.crc32(blob) != crc32:
                raise self._error(entry, shard, "frames.mp", f"frame {frame} has another crc32 than the index promises")
            blobs.append(blob)
        return blobs

    def _points(self, entry: IndexEntry, shard: int, chosen: np.ndarray) -> np.ndarray | None:
        if "keypoints.mp" not in entry.members:
            return None
        blob = self._read(entry, shard, "keypoints.mp", *entry.members["keypoints.mp"])
        if zlib.crc32(blob) != entry.crc32["keypoints.mp"]:
            raise self._error(entry, shard, "keypoints.mp", "has another crc32 than the index promises")
        points, _ = unpack_points(blob)
        return points_of_frames(points, chosen)

    def _read(self, entry: IndexEntry, shard: int, member: str, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        filled = 0
        try:
            while filled < size and (count := os.preadv(self._files[shard], [memoryview(buffer)[filled:]], offset + filled)):
                filled += count  # a network file system may give less than asked
        except OSError as error:
            raise self._error(entry, shard, member, f"cannot be read ({error.strerror})") from error
        if filled != size:
            raise self._error(entry, shard, member, f"{filled} of {size} bytes could be read: the shard became shorter")
        return buffer

    def _error(self, entry: IndexEntry, shard: int, member: str, reason: str) -> ClipError:
        offset = entry.members[member][0]
        return ClipError(
            f"{self._paths[shard]}: clip '{entry.facts.key}', member {member} at offset {offset}: {reason}. Run python -m convert verify on its folder."
        )

    def close(self) -> None:
        for descriptor in self._files:
            os.close(descriptor)
        self._files.clear()


def _allow_open_files(count: int) -> None:
    """Raises this process's soft limit, 1024 on many systems, towards its hard one: a split may have more shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + SPARE_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def points_of_frames(points: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int64 (M, 3): the points of the chosen frames, t now the place among the chosen; a frame chosen twice brings its points twice."""
    parts = [points[points[:, 0] == frame].astype(np.int64) for frame in chosen]
    for place, part in enumerate(parts):
        part[:, 0] = place
    return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
