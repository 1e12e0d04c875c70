"""Clips out of shards, by offset: the index says where each frame lies, preadv fetches the chosen ones, their crc32 is checked.

Never mapped: a file cut short under a mapping ends the process, a short pread is an error that names the clip.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clips.clip import ClipSpec
from clips.codecs import make_codec
from clips.errors import ClipError, InputError
from clips.format import IndexEntry, unpack_points
from clips.manifest import read_index, read_manifest, tar_path
from clips.words import counted

from .source import ChooseFrames, Frames, Loaded
from .staging import Stager

if TYPE_CHECKING:
    import torch

    from .finish import Graph

SPARE_FILES = 512  # for everything else that a training opens
GAP_BYTES = 65536  # bytes nobody asked for that are read along rather than read around: a second request costs more
BLOCK = tarfile.BLOCKSIZE


class ShardSource:
    """A split of a folder that `python -m convert pack` wrote."""

    def __init__(self, home: Path, split: str) -> None:
        manifest = read_manifest(home)
        if split not in manifest.splits:
            raise InputError(f"--dataset-home {home}: no split {split}; its shards hold {', '.join(manifest.splits)}.")
        self._home, self._split, self._shards = home, split, manifest.splits[split].shards
        self.class_names, self.stored, self.source = manifest.classes, manifest.stored, manifest.source
        self.codec = make_codec(manifest.codec, manifest.codec_settings)
        self._paths: list[Path] = []
        self._files: list[int] = []
        self._stager: Stager | None = None
        self._buffers: list[bytearray] = []  # those not in use, for the next reads
        entries: list[tuple[IndexEntry, int]] = []
        _allow_open_files(len(self._shards))
        try:
            for shard in self._shards:
                index = read_index(home, split, shard)
                self._open(tar_path(home, split, shard.name), shard.tar_bytes)
                entries += [(entry, len(self._paths) - 1) for entry in index.clips]
        except BaseException:
            self.close()
            raise
        entries.sort(key=lambda pair: pair[0].facts.key.encode())
        self._entries = entries
        self.facts = [entry.facts for entry, _ in entries]
        self._kind = f"{manifest.codec} of " + ", ".join(f"{name} {value}" for name, value in manifest.codec_settings.items())

    def __reduce__(self) -> tuple[type[ShardSource], tuple[Path, str]]:
        return type(self), (self._home, self._split)

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

    def graph(self, spec: ClipSpec, micro_batch: int, device: torch.device, threads: int, hw_decoder_load: float) -> Graph | None:
        return None

    def describe(self) -> list[str]:
        staged = self._stager.describe() if self._stager else []
        return [f"{counted(len(self.facts), 'clip')} in {counted(len(self._paths), 'shard')}, {self._kind}, frames stored as {self.stored}", *staged]

    def stage(self, folder: Path) -> None:
        self._stager = Stager(self._home, self._split, self._shards, folder, self._read_from)
        self._stager.start()

    def _read_from(self, name: str, path: Path) -> None:
        """From now on the shard is read from its copy: the descriptor keeps its number, reads under way end where they began."""
        place = next(place for place, shard in enumerate(self._shards) if shard.name == name)
        copy = os.open(path, os.O_RDONLY)
        os.dup2(copy, self._files[place], inheritable=False)
        os.close(copy)
        self._paths[place] = path

    def where(self, number: int) -> tuple[str, int]:
        entry, shard = self._entries[number]
        return self._shards[shard].name, int(entry.frames["offset"][0])

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> ShardClip:
        entry, shard = self._entries[number]
        chosen = choose(entry.facts.frames_valid)
        wanted = [entry.members["cls"], (_header_of_frames(entry), entry.members["frames.mp"][0] - _header_of_frames(entry))]
        records = entry.frames[chosen]
        wanted += zip(records["offset"].tolist(), records["size"].tolist(), strict=True)
        with_points = with_points and "keypoints.mp" in entry.members
        if with_points:
            wanted.append(entry.members["keypoints.mp"])
        clip = ShardClip(self, entry, shard, chosen, runs_of(wanted), with_points, self._buffers)
        try:
            for begin, size, place in clip.runs:
                self._read(clip, begin, clip.bytes[place : place + size])
        except BaseException:
            clip.release()
            raise
        return clip

    def _read(self, clip: ShardClip, offset: int, buffer: memoryview) -> None:
        filled, size = 0, len(buffer)
        try:
            while filled < size and (count := os.preadv(self._files[clip.shard], [buffer[filled:]], offset + filled)):
                filled += count  # a network file system may give less than asked
        except OSError as error:
            raise clip.error("frames.mp", f"cannot be read ({error.strerror})") from error
        if filled != size:
            raise clip.error("frames.mp", f"{filled} of {size} bytes could be read: the shard became shorter")

    def path_of(self, shard: int) -> Path:
        return self._paths[shard]

    def close(self) -> None:
        if self._stager:
            self._stager.close()
            self._stager = None
        for descriptor in self._files:
            os.close(descriptor)
        self._files.clear()
        self._buffers.clear()


class ShardClip:
    """One clip's bytes as they lie in the shard: label, the header that names the frames' member, the chosen frames, points."""

    def __init__(
        self,
        source: ShardSource,
        entry: IndexEntry,
        shard: int,
        chosen: np.ndarray,
        runs: Sequence[tuple[int, int, int]],
        with_points: bool,
        free: list[bytearray],
    ) -> None:
        self._source, self._entry, self.shard, self._chosen, self._with_points, self._free = source, entry, shard, chosen, with_points, free
        self.runs = runs
        self._buffer: bytearray | None = _buffer_of(runs[-1][1] + runs[-1][2], free)
        self.bytes = memoryview(self._buffer)

    def decode(self, frames: Frames) -> Loaded:
        try:
            self._decode_frames(frames)
            points = self._points() if self._with_points else None
            return Loaded(self._key(), self._label(), points)
        finally:
            self.release()

    def _decode_frames(self, frames: Frames) -> None:
        records = self._entry.frames[self._chosen]
        for number, (offset, size, crc32) in enumerate(records.tolist()):
            blob = self._at(offset, size)
            if zlib.crc32(blob) != crc32:
                raise self.error("frames.mp", f"frame {self._chosen[number]} has another crc32 than the index promises")
            try:
                self._source.codec.decode(blob, frames.place(number))
            except ValueError as error:
                raise self.error("frames.mp", f"frame {self._chosen[number]} does not decode ({error})") from error
            frames.done(number)

    def _key(self) -> str:
        """As the tar itself says, in the header of the member whose frames were decoded."""
        begin = _header_of_frames(self._entry)
        header = bytes(self._at(begin, self._entry.members["frames.mp"][0] - begin))
        try:
            name = _member_name(header)
        except (tarfile.TarError, UnicodeError) as error:
            raise self.error("frames.mp", f"its header in the tar is damaged ({error})") from error
        if name != f"{self._entry.facts.key}.frames.mp":
            raise self.error("frames.mp", f"its header in the tar names {name!r}")
        return name.removesuffix(".frames.mp")

    def _label(self) -> int:
        blob = self._at(*self._entry.members["cls"])
        if zlib.crc32(blob) != self._entry.crc32["cls"]:
            raise self.error("cls", "has another crc32 than the index promises")
        return int(bytes(blob))

    def _points(self) -> np.ndarray:
        blob = self._at(*self._entry.members["keypoints.mp"])
        if zlib.crc32(blob) != self._entry.crc32["keypoints.mp"]:
            raise self.error("keypoints.mp", "has another crc32 than the index promises")
        points, _ = unpack_points(bytes(blob))
        return points_of_frames(points, self._chosen)

    def _at(self, offset: int, size: int) -> memoryview:
        begin, _, place = next(run for run in self.runs if run[0] <= offset and offset + size <= run[0] + run[1])
        return self.bytes[place + offset - begin : place + offset - begin + size]

    def release(self) -> None:
        if self._buffer is not None:
            self.bytes.release()
            self._free.append(self._buffer)
            self._buffer = None

    def error(self, member: str, reason: str) -> ClipError:
        return clip_error(self._source.path_of(self.shard), self._entry, member, reason)


def clip_error(path: Path, entry: IndexEntry, member: str, reason: str) -> ClipError:
    """What is wrong with a clip, to the byte."""
    return ClipError(
        f"{path}: clip '{entry.facts.key}', member {member} at offset {entry.members[member][0]}: {reason}. Run python -m convert verify on its folder."
    )


def runs_of(wanted: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """The reads that fetch all (offset, size) wanted: (offset, size, place in the buffer), gaps of up to GAP_BYTES read along."""
    runs: list[tuple[int, int, int]] = []
    for offset, size in sorted(wanted):
        if runs and offset <= runs[-1][0] + runs[-1][1] + GAP_BYTES:
            begin, before, place = runs[-1]
            runs[-1] = (begin, max(before, offset + size - begin), place)
        else:
            runs.append((offset, size, runs[-1][1] + runs[-1][2] if runs else 0))
    return runs


def _buffer_of(size: int, free: list[bytearray]) -> bytearray:
    """One of the free buffers, made longer where it is too short: after some clips nothing is allocated any more."""
    try:
        buffer = free.pop()
    except IndexError:
        buffer = bytearray()
    return buffer if len(buffer) >= size else bytearray(size + size // 4)


def _header_of_frames(entry: IndexEntry) -> int:
    """Where the tar header of the frames' member begins: after the label's blocks. It is longer than one block for a long or foreign name."""
    begin, size = entry.members["cls"]
    return begin + size + -size % BLOCK


def _member_name(header: bytes) -> str:
    """The member's name in its header's blocks; raises tarfile.TarError, also where its checksum is wrong."""
    if len(header) == BLOCK:
        return tarfile.TarInfo.frombuf(header, "utf-8", "strict").name
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:", encoding="utf-8", errors="strict") as tar:
        member = tar.next()
        if member is None:
            raise tarfile.TarError("no header")
        return member.name


def _allow_open_files(count: int) -> None:
    """Raises this process's soft limit, 1024 on many systems, towards its hard one: a split may have more shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + SPARE_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def points_of_frames(points: np.ndarray, chosen: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 (M, 3): the points of the chosen frames, t now the place among the chosen; a frame chosen twice brings its points twice."""
    parts = [points[points[:, 0] == frame].astype(np.int64) for frame in chosen]
    for place, part in enumerate(parts):
        part[:, 0] = place
    return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
