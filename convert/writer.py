"""One shard: a tar that plain tools read, and its index, each complete or absent."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from clips.files import whole_file, write_whole
from clips.format import IndexEntry, ShardIndex, pack_index
from clips.manifest import index_path, tar_path
from clips.snippets import Bad

from .encode import EncodedClip

BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE


def write_shard(
    folder: Path, split: str, name: str, plan_id: str, clips: Iterable[EncodedClip], bad: Sequence[Bad] = (), mended: Mapping[str, int] | None = None
) -> ShardIndex:
    """Writes the tar, then the index: a shard with an index is a whole one. `bad` may fill while `clips` are taken.

    `mended` gives the bytes of files whose size is not the planned one.
    """
    with whole_file(tar_path(folder, split, name)) as file:
        tar = _HashedTar(file)
        entries = tuple(_write_clip(tar, clip) for clip in clips)
        tar.finish()
    left_out = tuple({"path": one.path, "reason": one.reason} for one in bad)
    sizes = tuple({"path": path, "bytes": file_bytes} for path, file_bytes in sorted((mended or {}).items()))
    index = ShardIndex(plan_id, name, tar.position, tar.digest.hexdigest(), left_out, entries, sizes)
    write_whole(index_path(folder, split, name), pack_index(index))
    return index


def _write_clip(tar: _HashedTar, clip: EncodedClip) -> IndexEntry:
    members, crc32, frames = {}, {}, clip.frames.copy()
    for suffix, blob in clip.members:
        offset = tar.add(f"{clip.facts.key}.{suffix}", blob)
        members[suffix] = (offset, len(blob))
        crc32[suffix] = zlib.crc32(blob)
        if suffix == "frames.mp":
            frames["offset"] += offset
    return IndexEntry(clip.facts, clip.video_sha256, clip.dhash, clip.frames_constant, members, crc32, frames)


class _HashedTar:
    """Members one after another; time, owner and mode are fixed, so same clips give the same bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0
        self.digest = hashlib.sha256()

    def add(self, name: str, blob: bytes) -> int:
        """The offset of the member's data."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(blob), 0o644, 0  # an integer time: a float one makes an extra header
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        offset = self.position
        self._write(blob)
        self._write(bytes(-len(blob) % BLOCK))
        return offset

    def finish(self) -> None:
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.position % RECORD))

    def _write(self, blob: bytes) -> None:
        self._file.write(blob)
        self.digest.update(blob)
        self.position += len(blob)
