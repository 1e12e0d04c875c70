"""One snippet to the members of one clip: read -> check -> resize -> encode frames -> pack."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clips.clip import ClipSpec
from clips.codecs import Codec, make_codec
from clips.format import ClipFacts, pack_array, pack_frames, pack_json, pack_points
from clips.snippets import ArrayNames, Content, Snippet, read

DHASH_PLACES = (1 / 6, 1 / 2, 5 / 6)  # of the valid frames: three small pictures tell motion apart too


@dataclass(frozen=True)
class Recipe:
    """How snippets become clips; the same for all of a pack."""

    codec: str
    codec_settings: dict[str, int | str]
    source: ClipSpec
    stored: ClipSpec
    names: ArrayNames
    extras: tuple[str, ...]

    def make_codec(self) -> Codec:
        return make_codec(self.codec, self.codec_settings)


@dataclass(frozen=True)
class EncodedClip:
    """The members (suffix, bytes) in their order; FRAME records with offsets from the start of frames.mp."""

    facts: ClipFacts
    video_sha256: str
    dhash: bytes
    frames_constant: int
    members: tuple[tuple[str, bytes], ...]
    frames: np.ndarray


def encode_clip(home: Path, snippet: Snippet, recipe: Recipe, codec: Codec) -> EncodedClip:
    """Raises BadNpz for a snippet that cannot be used."""
    content = read(home / snippet.path, recipe.source, recipe.names, recipe.extras)
    facts = ClipFacts(snippet.key, snippet.label, snippet.source, snippet.index, snippet.begin_ms, snippet.end_ms, content.frames_valid)
    blobs = [codec.encode(frame) for frame in stored_frames(content.video, recipe.stored)]
    frames_member, records = pack_frames(codec.name, recipe.stored.video_shape, blobs)
    others = [("keypoints.mp", pack_points(content.points, recipe.source.mask_shape))] if content.points is not None else []
    others += [(f"{name}.mp", pack_array(array)) for name, array in sorted(content.extras.items())]
    provenance = _provenance(snippet, content, recipe)
    provenance["members"] = {suffix: hashlib.sha256(blob).hexdigest() for suffix, blob in [("frames.mp", frames_member), *others]}
    members = [("cls", str(snippet.label).encode()), ("frames.mp", frames_member), ("json", pack_json(provenance)), *others]
    valid = content.video[: content.frames_valid]
    video_sha256 = provenance["arrays"][recipe.names.video]["sha256"]
    return EncodedClip(facts, video_sha256, dhash(valid), num_constant(valid), tuple(members), records)


def stored_frames(video: np.ndarray, stored: ClipSpec) -> np.ndarray:
    """uint8 (T, h, w, 3): the video itself, or each frame made smaller by Pillow's antialiased bicubic filter."""
    if video.shape == stored.video_shape:
        return video
    size = (stored.width, stored.height)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in video])


def num_constant(frames: np.ndarray) -> int:
    """How many frames are of one colour throughout; a look at the diagonal spares most frames the full comparison."""
    diagonal = np.arange(min(frames.shape[1:3]))
    return sum(bool((frame[diagonal, diagonal] == frame[0, 0]).all() and (frame == frame[0, 0]).all()) for frame in frames)


def dhash(frames: np.ndarray) -> bytes:
    """24 bytes: of three frames the signs of the differences between neighbours in an 8x9 picture of mean brightness."""
    bits = []
    for place in DHASH_PLACES:
        frame = Image.fromarray(frames[int(place * len(frames))]).convert("L").resize((9, 8), Image.Resampling.BOX)
        small = np.asarray(frame, np.int16)
        bits.append(small[:, 1:] > small[:, :-1])
    return np.packbits(np.stack(bits)).tobytes()


def sha256_of_array(array: np.ndarray) -> str:
    """Of the C-order bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data).hexdigest()


def told_of(array: np.ndarray) -> dict[str, Any]:  # Any: a map of JSON
    """What KEY.json tells of a source array."""
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": sha256_of_array(array)}


def _provenance(snippet: Snippet, content: Content, recipe: Recipe) -> dict[str, Any]:
    arrays = {recipe.names.video: content.video, recipe.names.keypoints: content.keypoints, **content.extras}
    return {
        "path": snippet.path,
        "source": snippet.source,
        "index": snippet.index,
        "begin_ms": snippet.begin_ms,
        "end_ms": snippet.end_ms,
        "frames_valid": content.frames_valid,
        "source_shape": list(recipe.source.video_shape),
        "arrays": {name: told_of(array) for name, array in arrays.items() if array is not None},
    }
