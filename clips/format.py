"""Format version 1 as data: the members of a clip in a shard and the index beside the shard. docs/format.md is its promise.

A clip's members, in this order: KEY.cls, KEY.frames.mp, KEY.json, KEY.keypoints.mp, and KEY.<array>.mp for kept extras.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import zstandard

FORMAT_VERSION = 1
FRAME = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])  # where a frame's bytes lie in the tar


@dataclass(frozen=True)
class ClipFacts:
    """What is known of a clip without reading it; begin and end are ms of the source, None where they are not known."""

    key: str
    label: int
    source: str
    index: int | None
    begin_ms: int | None
    end_ms: int | None
    frames_valid: int


@dataclass(frozen=True)
class IndexEntry:
    """One clip of a shard: its facts, (offset, size) and crc32 of each member's data, and FRAME records (T,).

    `video_sha256` is the source video's, `frames_constant` counts its valid frames of one colour.
    """

    facts: ClipFacts
    video_sha256: str
    dhash: bytes
    frames_constant: int
    members: dict[str, tuple[int, int]]
    crc32: dict[str, int]
    frames: np.ndarray


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard; `bad` are the snippets that were left out, with reasons; `mended` those whose file

    had another size in the plan, because it was bad at first, with the bytes that it has now.
    """

    plan_id: str
    shard: str
    tar_bytes: int
    tar_sha256: str
    bad: tuple[dict[str, str], ...]
    clips: tuple[IndexEntry, ...]
    mended: tuple[dict[str, Any], ...] = ()  # Any: a path, a number


class FormatError(ValueError):
    """Bytes that are not what the format says; the text is the reason."""


def pack_frames(codec: str, shape: tuple[int, ...], blobs: Sequence[bytes]) -> tuple[bytes, np.ndarray]:
    """KEY.frames.mp and the FRAME records (T,), their offsets counted from the member's first byte."""
    packer = msgpack.Packer()
    parts = [packer.pack_map_header(4), packer.pack("codec"), packer.pack(codec), packer.pack("shape"), packer.pack(list(shape))]
    parts += [packer.pack("frames"), packer.pack_array_header(len(blobs))]
    records = np.empty(len(blobs), FRAME)
    position = sum(map(len, parts))
    for number, blob in enumerate(blobs):
        packed = packer.pack(blob)
        records[number] = (position + len(packed) - len(blob), len(blob), zlib.crc32(blob))
        parts.append(packed)
        position += len(packed)
    parts += [packer.pack("crc32"), packer.pack([int(c) for c in records["crc32"]])]
    return b"".join(parts), records


def pack_points(points: np.ndarray, shape: Sequence[int]) -> bytes:
    """KEY.keypoints.mp: little-endian uint16 (N, 3) of t, y, x in source coordinates, and the mask's shape."""
    return pack_map({"shape": list(shape), "points": points.astype("<u2").tobytes()})


def unpack_points(blob: bytes | bytearray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint16 (N, 3) and the mask's shape (T, H, W)."""
    packed = unpack_map(blob)
    try:
        frames, height, width = packed["shape"]
        return np.frombuffer(packed["points"], "<u2").reshape(-1, 3), (frames, height, width)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"no points ({error!r})") from error


def pack_array(array: np.ndarray) -> bytes:
    """KEY.<array>.mp: dtype as numpy spells it, shape, and the C-order bytes as one Zstandard frame."""
    data = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(array.tobytes())
    return pack_map({"dtype": array.dtype.str, "shape": list(array.shape), "zstd": data})


def unpack_array(blob: bytes) -> np.ndarray:
    """The array; raises FormatError."""
    packed = unpack_map(blob)
    try:
        data = zstandard.ZstdDecompressor().decompress(packed["zstd"])
        return np.frombuffer(data, np.dtype(packed["dtype"])).reshape(packed["shape"])
    except (KeyError, TypeError, ValueError, zstandard.ZstdError) as error:
        raise FormatError(f"not an array ({error!r})") from error


def pack_json(value: dict[str, Any]) -> bytes:
    """Sorted, compact, UTF-8: same value, same bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def pack_map(value: dict[str, Any]) -> bytes:
    blob: bytes = msgpack.packb(value)
    return blob


def unpack_map(blob: bytes | bytearray | memoryview) -> dict[str, Any]:  # Any: the caller knows its map
    try:
        value = msgpack.unpackb(blob, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise FormatError(f"not msgpack ({error or type(error).__name__})") from error
    if not isinstance(value, dict):
        raise FormatError(f"expected a map, found {type(value).__name__}")
    return value


def pack_index(index: ShardIndex) -> bytes:
    clips = [
        {
            "key": entry.facts.key,
            "label": entry.facts.label,
            "source": entry.facts.source,
            "index": entry.facts.index,
            "begin_ms": entry.facts.begin_ms,
            "end_ms": entry.facts.end_ms,
            "frames_valid": entry.facts.frames_valid,
            "video_sha256": entry.video_sha256,
            "dhash": entry.dhash,
            "frames_constant": entry.frames_constant,
            "crc32": entry.crc32,
            "members": {suffix: list(place) for suffix, place in entry.members.items()},
            "frames": entry.frames.astype(FRAME).tobytes(),
        }
        for entry in index.clips
    ]
    return pack_map(
        {
            "format": FORMAT_VERSION,
            "plan_id": index.plan_id,
            "shard": index.shard,
            "tar_bytes": index.tar_bytes,
            "tar_sha256": index.tar_sha256,
            "bad": list(index.bad),
            "mended": list(index.mended),
            "clips": clips,
        }
    )


def unpack_index(blob: bytes) -> ShardIndex:
    """Raises FormatError for bytes that are no index of this version; unknown fields are ignored."""
    packed = unpack_map(blob)
    if packed.get("format") != FORMAT_VERSION:
        raise FormatError(f"an index of format version {packed.get('format')}; this program reads version {FORMAT_VERSION}")
    try:
        clips = tuple(_entry(clip) for clip in packed["clips"])
        bad, mended = tuple(packed["bad"]), tuple(packed["mended"])
        return ShardIndex(packed["plan_id"], packed["shard"], packed["tar_bytes"], packed["tar_sha256"], bad, clips, mended)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"an index without its fields ({error!r})") from error


def _entry(clip: dict[str, Any]) -> IndexEntry:
    facts = ClipFacts(
        clip["key"], clip["label"], clip["source"], clip["index"], clip["begin_ms"], clip["end_ms"], clip["frames_valid"]
    )
    members = {suffix: (offset, size) for suffix, (offset, size) in clip["members"].items()}
    frames = np.frombuffer(clip["frames"], FRAME)
    return IndexEntry(facts, clip["video_sha256"], clip["dhash"], clip["frames_constant"], members, clip["crc32"], frames)
