"""What is wrong with one clip of a shard: its members against the index, the manifest and each other, and against its npz.

members -> crc32 -> json and label -> frames decoded, keypoints, kept arrays -> (npz: arrays, labels, PSNR)
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clips import snippets as source
from clips.codecs import make_codec
from clips.format import FORMAT_VERSION, IndexEntry, unpack_array, unpack_map, unpack_points
from clips.keypoints import mask_of
from clips.manifest import Manifest
from clips.npz import BadNpz
from clips.snippets import ArrayNames, Snippet, read

from .encode import dhash, num_constant, sha256_of_array, stored_frames, told_of


@dataclass(frozen=True)
class Unpacked:
    """A decoded clip: its frames and mask, and what its json tells of each packed array: dtype, shape and sha256."""

    video: np.ndarray
    keypoints: np.ndarray | None
    known: dict[str, dict[str, Any]]  # Any: JSON


def read_members(file: BinaryIO, entry: IndexEntry) -> dict[str, bytes]:
    """Suffix to bytes, fewer of them where the shard is too short."""
    blobs = {}
    for suffix, (offset, size) in entry.members.items():
        file.seek(offset)
        blobs[suffix] = file.read(size)
    return blobs


def damage(entry: IndexEntry, blobs: dict[str, bytes]) -> str | None:
    """Which members are not the bytes that the index tells of, and which frames; None where all are."""
    wrong = [suffix for suffix, blob in blobs.items() if zlib.crc32(blob) != entry.crc32.get(suffix)]
    if not wrong:
        return None
    start = entry.members["frames.mp"][0]
    begins, sizes = (entry.frames["offset"].astype(np.int64) - start).tolist(), entry.frames["size"].tolist()
    slices = [blobs["frames.mp"][max(0, begin) : max(0, begin + size)] for begin, size in zip(begins, sizes, strict=True)]
    frames = [str(number) for number, blob in enumerate(slices) if zlib.crc32(blob) != entry.frames["crc32"][number]] if "frames.mp" in wrong else []
    return ", ".join(wrong) + (f" (frame{'s' * (len(frames) > 1)} {', '.join(frames)})" if frames else "")


def unpacked(manifest: Manifest, entry: IndexEntry, blobs: dict[str, bytes]) -> tuple[list[str], Unpacked | None]:
    """What is wrong with the clip, and the clip where it could be decoded."""
    found: list[Unpacked] = []
    try:
        problems = list(_problems(manifest, entry, blobs, found))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problems = [f"a member is not as format version {FORMAT_VERSION} says ({error!r})"]
    return problems, found[0] if found else None


def _problems(manifest: Manifest, entry: IndexEntry, blobs: dict[str, bytes], found: list[Unpacked]) -> Iterator[str]:
    """Sentences; the clip goes to `found` when it is decoded."""
    facts = entry.facts
    try:
        provenance = json.loads(blobs["json"])
        label = int(blobs["cls"])
        frames = unpack_map(blobs["frames.mp"])
    except (KeyError, ValueError) as error:
        yield f"a member is missing or damaged ({error!r})"
        return
    class_name = provenance["path"].split("/")[1]
    if label != facts.label or class_name not in manifest.classes or manifest.classes.index(class_name) != label:
        yield f"label {label} in its member, {facts.label} in the index, its path says {class_name}"
    told = {name: provenance[name] for name in ("source", "index", "begin_ms", "end_ms", "frames_valid")} | {"key": source.key_of(provenance["path"])}
    if different := sorted(name for name, value in told.items() if getattr(facts, name) != value):
        yield f"its json and the index disagree on {', '.join(different)}"
    if {suffix: zlib.crc32(blob) for suffix, blob in blobs.items()} != entry.crc32:
        yield "a member has another crc32 than the index says"
    if {suffix: hashlib.sha256(blob).hexdigest() for suffix, blob in blobs.items() if suffix not in ("cls", "json")} != provenance["members"]:
        yield "a member is not the one that its json tells of"
    of_video = provenance["arrays"][manifest.arrays["video"]]
    if entry.video_sha256 != of_video["sha256"]:
        yield "its json and the index disagree on the source video"
    shape = list(manifest.source.video_shape)
    if (of_video["dtype"], of_video["shape"], provenance["source_shape"]) != ("|u1", shape, shape):
        yield f"its json tells of another source video than the manifest's uint8 {_by(shape)}"
    video = np.empty(manifest.stored.video_shape, np.uint8)
    if problem := _decode(manifest, entry, frames, blobs["frames.mp"], video):
        yield problem
        return
    keypoints = _mask(blobs)
    for name, array in [(manifest.arrays["keypoints"], keypoints)] + [(n, _extra(blobs, n)) for n in manifest.arrays["kept"]]:
        known = provenance["arrays"].get(name)
        if (known is None) != (array is None):
            yield f"array '{name}' is in its member or in its json, but not in both"
        elif array is not None and (list(array.shape), sha256_of_array(array.astype(known["dtype"]))) != (known["shape"], known["sha256"]):
            yield f"array '{name}' has another sha256 or shape than the npz had when it was packed"
    lossless = make_codec(manifest.codec, manifest.codec_settings).lossless
    if lossless and sha256_of_array(video) != of_video["sha256"]:
        yield "frames have another sha256 than the npz had when it was packed"
    if lossless and not _looks_like(video, entry):
        yield "its frames look otherwise than the index says (frames_valid, dhash or frames_constant)"
    found.append(Unpacked(video, keypoints, provenance["arrays"]))


def _decode(manifest: Manifest, entry: IndexEntry, frames: dict[str, Any], member: bytes, video: np.ndarray) -> str | None:  # Any: a msgpack map
    """Fills `video`; the reason when the frames are not as promised or not where the index says."""
    codec = make_codec(manifest.codec, manifest.codec_settings)
    blobs = frames["frames"]
    if (frames["codec"], tuple(frames["shape"])) != (codec.name, video.shape) or {len(blobs), len(entry.frames), len(frames["crc32"])} != {len(video)}:
        found = f"{frames['codec']} {_by(frames['shape'])}, {len(blobs)} in the member and {len(entry.frames)} in the index"
        return f"frames are {found}; the manifest promises {codec.name} {_by(video.shape)}"
    start = entry.members["frames.mp"][0]
    for number, (blob, crc32, record) in enumerate(zip(blobs, frames["crc32"], entry.frames, strict=True)):
        offset = int(record["offset"]) - start
        if offset < 0 or member[offset : offset + int(record["size"])] != blob:
            return f"frame {number} is not where the index says"
        if not zlib.crc32(blob) == crc32 == record["crc32"]:
            return f"frame {number} has another crc32 than recorded"
        try:
            codec.decode(blob, video[number])
        except ValueError as error:
            return f"frame {number} does not decode ({error})"
    return None


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _mask(blobs: dict[str, bytes]) -> np.ndarray | None:
    if "keypoints.mp" not in blobs:
        return None
    points, shape = unpack_points(blobs["keypoints.mp"])
    return mask_of(points, shape)


def _extra(blobs: dict[str, bytes], name: str) -> np.ndarray | None:
    return unpack_array(blobs[f"{name}.mp"]) if f"{name}.mp" in blobs else None


def against_npz(manifest: Manifest, entry: IndexEntry, clip: Unpacked, home: Path, snippets: dict[str, Snippet]) -> tuple[list[str], float | None]:
    """How the clip differs from its npz, and their PSNR in dB, infinite where frames are equal, None where the npz cannot be read."""
    snippet = snippets.get(entry.facts.key)
    if snippet is None:
        return [f"its npz is not in {home}"], None
    problems = []
    if snippet.label != entry.facts.label:
        problems.append(f"label {entry.facts.label}; its folder in {home} says {snippet.label} ({snippet.class_name})")
    arrays = manifest.arrays
    names = ArrayNames(str(arrays["video"]), str(arrays["keypoints"]), arrays["keypoints_mode"])  # type: ignore[arg-type]  # as pack checked it
    try:
        content = read(home / snippet.path, manifest.source, names, arrays["kept"])
    except BadNpz as error:
        return [*problems, f"its npz cannot be read: {error}"], None
    there = {names.video: content.video, names.keypoints: content.keypoints, **content.extras}
    now = {name: told_of(array) for name, array in there.items() if array is not None}
    same = [name for name in now.keys() & clip.known.keys() if now[name].items() <= clip.known[name].items()]
    if changed := sorted((now.keys() | clip.known.keys()) - set(same)):
        problems.append(f"its npz changed since it was packed: {', '.join(changed)}")
    elif not _looks_like(content.video, entry):
        problems.append(f"{home / snippet.path} looks otherwise than the index says (frames_valid, dhash or frames_constant)")
    if not _same(content.keypoints, clip.keypoints):
        problems.append(f"keypoints differ from {home / snippet.path}")
    expected = stored_frames(content.video, manifest.stored)
    if make_codec(manifest.codec, manifest.codec_settings).lossless and not np.array_equal(expected, clip.video):
        problems.append(f"frames differ from {home / snippet.path}")
    return problems, psnr_db(expected, clip.video)


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _looks_like(video: np.ndarray, entry: IndexEntry) -> bool:
    """Whether the source video has what the index tells of its look."""
    count = source.frames_valid(video)
    valid = video[:count]
    return (count, dhash(valid), num_constant(valid)) == (entry.facts.frames_valid, entry.dhash, entry.frames_constant)


def psnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Of two uint8 videos of one shape, over all frames: 10 log10(255² / mean squared error); infinite when equal."""
    squares = 0.0
    for a, b in zip(expected, found, strict=True):
        difference = a.reshape(-1).astype(np.float32) - b.reshape(-1)
        squares += float(np.dot(difference, difference))
    return math.inf if squares == 0 else 10 * math.log10(255**2 * expected.size / squares)
