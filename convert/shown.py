"""Clips as people look at them: some frames made small, the joints, and a caption.

index entry -> read by offset, crc32 checked -> decoded -> made small -> sheet.py (PNG) | page.py (HTML)
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clips.clip import ClipSpec
from clips.codecs import make_codec
from clips.errors import ClipError
from clips.format import FormatError, IndexEntry, unpack_points
from clips.manifest import Manifest, tar_path

FRAME_AREA = 160 * 160  # pixels of a small frame, whatever its aspect: 24 clips of 39 such frames are a page of 7 MB
STRIP_FRAMES = 8
# Of labels, in their order: white text is readable on each, and the first two differ for every kind of colour vision.
COLOURS = ("#1f62a8", "#c2410c", "#157a3c", "#7e22ce", "#be185d", "#0f766e", "#854d0e", "#475569")


@dataclass(frozen=True)
class Pick:
    """A clip to show, where it lies, the name of its class, and what a run took it for."""

    split: str
    shard: str
    entry: IndexEntry
    label: str
    prediction: str | None = None
    probability: float | None = None


@dataclass(frozen=True)
class Sheet:
    """What a sheet shows: its two headlines and its clips, in order."""

    folder: Path
    manifest: Manifest
    title: str
    sentence: str
    picks: tuple[Pick, ...]

    def colour_of(self, class_name: str) -> str:
        """#rrggbb; the ninth class has the first one's again."""
        return COLOURS[self.manifest.classes.index(class_name) % len(COLOURS)]

    def caption_of(self, pick: Pick) -> str:
        """`source · 1300-2600 ms · 39 of 39 frames valid`."""
        facts = pick.entry.facts
        times = "begin and end unknown" if facts.begin_ms is None else f"{facts.begin_ms}-{facts.end_ms} ms"
        return f"{facts.source} · {times} · {facts.frames_valid} of {self.manifest.stored.frames} frames valid"

    def points_of(self, pick: Pick) -> np.ndarray:
        """uint16 (N, 3) of t, y, x in source coordinates; none for a clip without keypoints."""
        if "keypoints.mp" not in pick.entry.members:
            return np.empty((0, 3), np.uint16)
        offset, size = pick.entry.members["keypoints.mp"]
        path = tar_path(self.folder, pick.split, pick.shard)
        blob = _read(path, [(offset, size)])[0]
        try:
            if zlib.crc32(blob) != pick.entry.crc32["keypoints.mp"]:
                raise FormatError("their crc32 is not the index's")
            return unpack_points(blob)[0]
        except FormatError as error:
            raise ClipError(f"{path}: clip '{pick.entry.facts.key}': keypoints at {offset} are damaged ({error}). {_advice(self.folder)}") from error

    def frames_of(self, pick: Pick, numbers: Sequence[int], size: tuple[int, int]) -> list[np.ndarray]:
        """uint8 (h, w, 3) for each of the frames; `size` is (h, w). Raises ClipError for a damaged frame."""
        path = tar_path(self.folder, pick.split, pick.shard)
        records = pick.entry.frames[list(numbers)]
        blobs = _read(path, [(int(record["offset"]), int(record["size"])) for record in records])
        codec = make_codec(self.manifest.codec, self.manifest.codec_settings)
        frame, frames = np.empty(self.manifest.stored.video_shape[1:], np.uint8), []
        for number, record, blob in zip(numbers, records, blobs, strict=True):
            try:
                if zlib.crc32(blob) != record["crc32"]:
                    raise ValueError("its crc32 is not the index's")
                codec.decode(blob, frame)
            except ValueError as error:
                where = f"{path}: clip '{pick.entry.facts.key}': frame {number} at {record['offset']}"
                raise ClipError(f"{where} is damaged ({error}). {_advice(self.folder)}") from error
            frames.append(resized(frame, size))
        return frames


def strip_numbers(frames_valid: int) -> list[int]:
    """At most STRIP_FRAMES frame numbers, evenly spaced, the first and the last valid one among them."""
    gaps = STRIP_FRAMES - 1
    return sorted({place * (frames_valid - 1) // gaps for place in range(STRIP_FRAMES)})


def small_size(spec: ClipSpec, enlarge: bool = False) -> tuple[int, int]:
    """Height and width of about FRAME_AREA pixels with the clip's aspect; larger than the clip only if asked."""
    scale = (FRAME_AREA / (spec.height * spec.width)) ** 0.5
    scale = scale if enlarge else min(1.0, scale)
    return max(1, round(spec.height * scale)), max(1, round(spec.width * scale))


def resized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A copy, uint8 (h, w, 3): antialiased, and without the unevenness of a box at odd ratios."""
    if frame.shape[:2] == size:
        return frame.copy()
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.HAMMING))


def _read(path: Path, places: Sequence[tuple[int, int]]) -> list[bytes]:
    try:
        with path.open("rb") as file:
            blobs = []
            for offset, size in places:
                file.seek(offset)
                blobs.append(file.read(size))
            return blobs
    except OSError as error:
        raise ClipError(f"{path}: cannot be read ({error.strerror or error}). {_advice(path.parent.parent)}") from error


def _advice(folder: Path) -> str:
    return f"Run python -m convert verify {folder}."
