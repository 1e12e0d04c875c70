"""The views of a clip in evaluation: other frames of each segment, other crops of the frame. Pure, and the same for every loader.

The probabilities of a clip are the mean over its views. One view is what evaluation always takes: the middle of each segment, the whole frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from clips.errors import InputError

from .sample import Box, View

KEPT = (9, 10)  # of the longer side in each of several crops
JUST_ABOVE = 2.0**-32  # lifts a place over the border of a frame that its float may lie an ulp below


@dataclass(frozen=True)
class Views:
    """How many choices of frames, and how many crops of each."""

    temporal: int = 1
    spatial: int = 1

    @property
    def count(self) -> int:
        return self.temporal * self.spatial

    def __str__(self) -> str:
        return f"{self.temporal}x{self.spatial}"


ONE_VIEW = Views()


def parse_views(text: str) -> Views:
    """`2x3` as 2 choices of frames and 3 crops of each, as Something-Something is usually tested."""
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if match is None:
        raise InputError(f"--views {text}: expected TxS, choices of frames times crops of each, such as 1x1 or 2x3.")
    return Views(int(match[1]), int(match[2]))


def all_views(views: Views, num_frames: int, height: int, width: int) -> list[tuple[np.ndarray | None, View]]:
    """Each view's draws for `choose_frames` and its crop of a stored frame, in the order in which they are evaluated.

    Dense sampling takes its window at the same place of the clip; centre sampling has one choice of frames, whatever the view.
    """
    crops = [View(box, False) for box in spatial_boxes(height, width, views.spatial)]
    moments = [temporal_offsets(num_frames, moment, views.temporal) if moment else None for moment in range(views.temporal)]
    return [(draws, crop) for draws in moments for crop in crops]


def temporal_offsets(num_frames: int, view: int, num_views: int) -> np.ndarray:
    """float64 (num_frames,) in [0, 1): where in its segment each frame of the view lies, as `draws` of `frames_uniform`.

    Evenly spaced around the segment, the middle first: of one view 1/2, of two 1/2 and 0 (as in VideoMAE's Something-Something test), of three
    1/2, 5/6 and 1/6. In a segment of n frames place p takes frame floor(n p), exactly. A segment with fewer frames than views gives some of them
    twice; a clip with fewer frames than are asked gives the same frames in every view.
    """
    if not 0 <= view < num_views:
        raise ValueError(f"view {view} of {num_views}")
    return np.full(num_frames, (num_views + 2 * view) % (2 * num_views) / (2 * num_views) + JUST_ABOVE)


def spatial_boxes(height: int, width: int, count: int) -> list[Box]:
    """`count` crops evenly spaced along the longer side, all of the shorter one, the width of a square; a single one is the whole frame.

    Nine tenths of the side, rounded up: the usual squares of the shorter side would be one and the same on a square frame, and on 4:3 keep 83 to
    88 % of the joints, these 94 to 97 % (15 real windows, points of strongest motion as stand-ins).
    """
    if count == 1:
        return [Box(0, 0, height, width)]
    side = max(height, width)
    kept = -(-side * KEPT[0] // KEPT[1])
    starts = [(2 * (side - kept) * place + count - 1) // (2 * (count - 1)) for place in range(count)]  # rounded, halves up
    if height > width:
        return [Box(start, 0, kept, width) for start in starts]
    return [Box(0, start, height, kept) for start in starts]
