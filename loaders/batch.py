"""What a training step eats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """video uint8 (B, T, H, W, 3) on the device, contiguous; keypoints 0/1 uint8 (B, T, H, W) or None; label int64 (B,);

    weight float32 (B,), 0 for a clip that could not be read; `number` is each clip's place among the split's sorted keys.
    """

    video: torch.Tensor
    keypoints: torch.Tensor | None
    label: torch.Tensor
    weight: torch.Tensor
    key: Sequence[str]
    number: Sequence[int]

    def __len__(self) -> int:
        return len(self.key)
