"""What the loaders must give, worked out again in pure Python: slow, without numpy's integers and without the code under test."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

WORD = (1 << 64) - 1


def mixed(number: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    number ^= number >> 30
    number = number * 0xBF58476D1CE4E5B9 & WORD
    number ^= number >> 27
    number = number * 0x94D049BB133111EB & WORD
    return number ^ number >> 31


def hashed(*parts: int | str) -> int:
    """BLAKE2b, 64 bits, over each part's length, type and text."""
    spelled = [f"{type(part).__name__}:{part}".encode() for part in parts]
    blob = b"".join(len(one).to_bytes(4, "little") + one for one in spelled)
    return int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "little")


def permutation(count: int, *seed: int | str) -> list[int]:
    first, second = hashed(*seed), hashed("second round", *seed)
    return sorted(range(count), key=lambda number: mixed(mixed(number ^ first) ^ second))


def uniforms(count: int, *seed: int | str) -> list[float]:
    start = hashed(*seed)
    return [(mixed((start + step * 0x9E3779B97F4A7C15) & WORD) >> 11) / 2**53 for step in range(1, count + 1)]


def frames(num_frames: int, frames_valid: int, draws: Sequence[float] | None) -> list[int]:
    """One frame of each of the equal segments of the valid frames; too few are repeated in order, the last one first of all."""
    if num_frames > frames_valid:
        return [math.ceil((place + 1) * frames_valid / num_frames) - 1 for place in range(num_frames)]
    chosen = []
    for place in range(num_frames):
        begin, end = place * frames_valid // num_frames, (place + 1) * frames_valid // num_frames
        length = max(1, end - begin)
        chosen.append(min(begin + (length // 2 if draws is None else int(draws[place] * length)), frames_valid - 1))
    return chosen


def view(
    height: int, width: int, draws: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float], hflip: float
) -> tuple[int, int, int, int, bool]:
    """Top, left, height, width of the crop, and whether it is flipped."""
    flip = draws[0] < hflip
    for area_draw, ratio_draw, down, across in zip(*[iter(draws[1:])] * 4, strict=True):
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        shape = math.exp(math.log(ratio[0]) + ratio_draw * (math.log(ratio[1]) - math.log(ratio[0])))
        tall, wide = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < tall <= height and 0 < wide <= width:
            return int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide, flip
    return 0, 0, height, width, flip


def mask(
    points: Sequence[tuple[int, int, int]],
    box: tuple[int, int, int, int],
    flip: bool,
    stored: tuple[int, int],
    source: tuple[int, int],
    shape: tuple[int, int, int],
) -> np.ndarray:
    """uint8 (T, H, W): each pixel is one where it covers the centre of a point, in fractions, the box being of the stored frame."""
    drawn = np.zeros(shape, np.uint8)
    for t, y, x in points:
        rows = [row for row in range(shape[1]) if _covers(row, y, box[0], box[2], stored[0], source[0], shape[1])]
        columns = [column for column in range(shape[2]) if _covers(column, x, box[1], box[3], stored[1], source[1], shape[2])]
        for row in rows:
            for column in columns:
                drawn[t, row, shape[2] - 1 - column if flip else column] = 1
    return drawn


def _covers(pixel: int, point: int, begin: int, length: int, stored: int, source: int, size: int) -> bool:
    """Whether the output's pixel, as a stretch of the source, holds the centre of the point's pixel."""
    low, high = ((begin + Fraction(edge * length, size)) * Fraction(source, stored) for edge in (pixel, pixel + 1))
    return low <= point + Fraction(1, 2) < high


def bilinear(video: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float64 (T, h, w, 3) of (T, H, W, 3): bilinear, half-pixel centres, edges repeated."""
    for axis, count in ((1, size[0]), (2, size[1])):
        place = np.clip((np.arange(count) + 0.5) * video.shape[axis] / count - 0.5, 0, video.shape[axis] - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, video.shape[axis] - 1)
        share = (place - low).reshape([-1 if a == axis else 1 for a in range(4)])
        video = video.take(low, axis).astype(np.float64) * (1 - share) + video.take(high, axis).astype(np.float64) * share
    return video
