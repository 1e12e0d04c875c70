"""A forger for tests of verify: changes clips, members or indexes of a packed folder and makes every checksum right again."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from clips.files import sha256_of
from clips.format import FRAME, ClipFacts, ShardIndex, pack_frames, pack_index, pack_json, pack_map, unpack_index
from clips.manifest import ShardEntry, index_path, read_manifest, tar_path, write_manifest
from convert.encode import EncodedClip
from convert.writer import write_shard


@dataclass
class Forged:
    """One clip to change as one likes: what its index entry tells, and its members in order."""

    facts: ClipFacts
    video_sha256: str
    dhash: bytes
    frames_constant: int
    members: dict[str, bytes]
    records: np.ndarray

    def encoded(self) -> EncodedClip:
        """With the frames' places and checksums as they are now, where the member still tells of frames."""
        try:
            frames = msgpack.unpackb(self.members["frames.mp"])
            records = pack_frames(frames["codec"], tuple(frames["shape"]), frames["frames"])[1]
        except (ValueError, KeyError, TypeError):
            records = self.records
        return EncodedClip(self.facts, self.video_sha256, self.dhash, self.frames_constant, tuple(self.members.items()), records)


Change = Callable[[dict[str, list[Forged]]], Any]  # of a split's clips by shard; Any: what it gives is not used


def forge(folder: Path, change: Change, split: str = "train") -> None:
    """The split's shards written anew after the change; indexes and manifest tell of them as if nothing had been."""
    entry = read_manifest(folder).splits[split]
    indexes = {shard.name: unpack_index(index_path(folder, split, shard.name).read_bytes()) for shard in entry.shards}
    clips = {name: _clips(tar_path(folder, split, name), index) for name, index in indexes.items()}
    change(clips)
    for name, of_shard in clips.items():
        write_shard(folder, split, name, indexes[name].plan_id, [clip.encoded() for clip in of_shard])
    make_manifest_right(folder, split)


def first(change: Callable[[Forged], Any]) -> Change:
    """The change of the first clip of the first shard."""
    return lambda clips: change(next(iter(clips.values()))[0])


def member(change: Callable[[dict[str, bytes]], Any]) -> Change:
    """The change of the members of the first clip."""
    return first(lambda clip: change(clip.members))


def forge_index(folder: Path, change: Callable[[ShardIndex], ShardIndex], split: str = "train", place: int = 0) -> None:
    """One shard's index changed, and the manifest with it."""
    path = index_path(folder, split, read_manifest(folder).splits[split].shards[place].name)
    path.write_bytes(pack_index(change(unpack_index(path.read_bytes()))))
    make_manifest_right(folder, split)


def make_manifest_right(folder: Path, split: str = "train") -> None:
    """The split's shards in the manifest as its indexes tell of them; their number of clips, too."""
    manifest = read_manifest(folder)
    entry = manifest.splits[split]
    shards = tuple(_shard(folder, split, shard.name, len(manifest.classes)) for shard in entry.shards)
    write_manifest(folder, replace(manifest, splits=manifest.splits | {split: replace(entry, shards=shards)}))


def make_json_right(members: dict[str, bytes], hash_of: Callable[[bytes], str]) -> None:
    """The json with the sums of the members beside it."""
    told = json.loads(members["json"])
    told["members"] = {suffix: hash_of(blob) for suffix, blob in members.items() if suffix not in ("cls", "json")}
    members["json"] = pack_json(told)


def with_frames(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    def apply(members: dict[str, bytes]) -> None:
        packed = msgpack.unpackb(members["frames.mp"])
        members["frames.mp"] = pack_frames(packed["codec"], tuple(packed["shape"]), change(packed["frames"]))[0]

    return member(apply)


def with_field(suffix: str, name: str, value: Any) -> Change:
    def apply(members: dict[str, bytes]) -> None:
        load, dump = (json.loads, pack_json) if suffix == "json" else (msgpack.unpackb, pack_map)
        members[suffix] = dump(load(members[suffix]) | {name: value})

    return member(apply)


def put(suffix: str, blob: bytes) -> Change:
    return member(lambda members: members.update({suffix: blob}))


def _clips(path: Path, index: ShardIndex) -> list[Forged]:
    with tarfile.open(path) as tar:
        blobs = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]  # all are files
    clips = []
    for entry in index.clips:
        members = {suffix: blobs[f"{entry.facts.key}.{suffix}"] for suffix in entry.members}
        records = entry.frames.astype(FRAME)
        records["offset"] -= entry.members["frames.mp"][0]
        clips.append(Forged(entry.facts, entry.video_sha256, entry.dhash, entry.frames_constant, members, records))
    return clips


def _shard(folder: Path, split: str, name: str, num_classes: int) -> ShardEntry:
    path = index_path(folder, split, name)
    index = unpack_index(path.read_bytes())
    labels = [entry.facts.label for entry in index.clips]
    return ShardEntry(name, len(labels), index.tar_bytes, index.tar_sha256, sha256_of(path), tuple(labels.count(label) for label in range(num_classes)))
