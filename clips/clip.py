"""A clip and its geometry."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class ClipSpec:
    """Frames, height and width in pixels: the one geometry that all clips of a data set share."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"a clip has at least one frame and one pixel; found {self}")

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        return self.frames, self.height, self.width, 3

    @property
    def mask_shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Clip:
    """One example: video uint8 (T, H, W, 3) RGB, keypoints 0/1 uint8 (T, H, W) or None, label the class's index."""

    key: str
    video: np.ndarray
    keypoints: np.ndarray | None
    label: int
