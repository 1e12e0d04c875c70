"""Snippets made for tests: small, seeded, and with frame number and position in their pixels, so that any shift shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

HOME = "ellen_show_length_1300_sample_rate_1_iou_0.55"


def tell_tale_video(number: int, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 (T, H, W, 3): red tells the frame and clip, green the row, blue the column; no frame is all zero."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    red = (1 + t * 5 + number * 37) % 256
    return np.stack([red, 255 * y // max(1, height - 1), 255 * x // max(1, width - 1)], axis=-1).astype(np.uint8)


def tell_tale_mask(number: int, frames: int, height: int, width: int, points: int = 5) -> np.ndarray:
    """uint8 0/1 (T, H, W) with up to `points` ones a frame, other ones in every frame and clip."""
    chance = np.random.RandomState(number)
    mask = np.zeros((frames, height, width), np.uint8)
    for frame in range(frames):
        mask[frame, chance.randint(0, height, points), chance.randint(0, width, points)] = 1
    return mask


def write_home(
    folder: Path,
    counts: Mapping[str, Mapping[str, int]],
    frames: int = 8,
    height: int = 32,
    width: int = 32,
    padded_every: int = 0,
    name: str = HOME,
) -> Path:
    """FOLDER/NAME/SPLIT/CLASS/%09d_<source>.npz with `counts[split][class]` snippets; the tail of every `padded_every`-th is zeros."""
    home = folder / name
    number = 0
    for split, classes in counts.items():
        running = 0
        for class_name, count in classes.items():
            (home / split / class_name).mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                video = tell_tale_video(number, frames, height, width)
                if padded_every and number % padded_every == 0:
                    video[frames - 2 :] = 0
                mask = tell_tale_mask(number, frames, height, width)
                path = home / split / class_name / f"{running:09d}_{split}_{class_name}_{running // 4:03d}.npz"
                np.savez_compressed(path, video=video, keypoints=mask)
                running += 1
                number += 1
    return home
