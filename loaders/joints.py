"""What the crops and erased boxes of training leave of the joints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from clips.errors import ClipError

from .sample import AugmentConfig, frames_uniform, hflip_chance, move_points, painted, random_view, training_draws
from .source import ClipSource

NUM_CLIPS = 64
FRAMES = 4  # of each clip: joints move little against the crop, and only these are decoded
EPOCH = 0


class Scratch:
    """Frames that nobody looks at."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._frame = np.empty(shape, np.uint8)

    def place(self, number: int) -> np.ndarray:
        return self._frame

    def done(self, number: int) -> None:
        """The next one takes its place."""


def joints_kept(
    source: ClipSource, numbers: Sequence[int], augment: AugmentConfig, seed: int, size: tuple[int, int], num_clips: int = NUM_CLIPS
) -> float | None:
    """The mean share of its joints that a clip of the first epoch keeps in frames of `size` (height, width); None where no clip has joints.

    Of `num_clips` of `numbers`, spread evenly, four frames each: about .1 s from shards. Clips that cannot be read are left to the training.
    """
    hflip = hflip_chance(augment, source.class_names)
    stored, points_in = (source.stored.height, source.stored.width), (source.source.height, source.source.width)
    scratch = Scratch((*stored, 3))
    shares = []
    for place in np.unique(np.linspace(0, len(numbers) - 1, num_clips).round().astype(int)).tolist():
        number = int(numbers[place])
        try:
            points = source.fetch(number, partial(frames_uniform, FRAMES, draws=None), True).decode(scratch).points
        except ClipError:
            continue
        if points is None or not len(points):
            continue
        chance = (seed, EPOCH, source.facts[number].key)
        view = painted(random_view(*stored, training_draws(FRAMES, *chance)[1], augment, hflip), augment, *chance)
        shares.append(len(move_points(points, view, stored, points_in, size)) / len(points))
    return float(np.mean(shares)) if shares else None
