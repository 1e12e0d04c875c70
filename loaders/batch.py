"""What a training step eats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be read: its place in the epoch's order, its key as planned, and why."""

    position: int
    key: str
    reason: str


@dataclass(frozen=True)
class Slowest:
    """The clip of a batch that took longest: in which stage (read or decode), from which file, how long in ms."""

    stage: str
    file: str
    ms: float


@dataclass(frozen=True)
class Batch:
    """video uint8 (B, T, H, W, 3) on the device, contiguous; keypoints 0/1 uint8 (B, T, H, W) or None; label int64 (B,);

    weight float32 (B,), 0 for a clip that could not be read (its video is zeros). `number` is each clip's place among the
    split's sorted keys, `position` its place in the epoch's order over all ranks; `labels` and `proof` are of the clips
    that were read, with keys and labels as the decoded clips themselves say.
    """

    video: torch.Tensor
    keypoints: torch.Tensor | None
    label: torch.Tensor
    weight: torch.Tensor
    key: Sequence[str]
    number: Sequence[int]
    position: Sequence[int]
    labels: Sequence[int]
    proof: int
    bad: Sequence[BadClip]
    slowest: Slowest

    def __len__(self) -> int:
        return len(self.key)
