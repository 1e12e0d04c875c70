"""What is asked of each clip of a pass: pure, and the same for every loader, in whichever process it decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .plan import Part, Plan
from .sample import AugmentConfig, View, frames_uniform, hflip_chance, random_view, training_draws, whole_view
from .source import ChooseFrames, ClipSource


@dataclass(frozen=True)
class Pass:
    """An epoch of training from the position `consumed` (clips of finished steps) on; an epoch of None is one pass of evaluation."""

    epoch: int | None
    consumed: int = 0


@dataclass(frozen=True)
class Request:
    """One clip: its number in the source, its place in the pass over all ranks, which of its frames, and the view taken of them."""

    number: int
    position: int
    choose: ChooseFrames
    view: View


@dataclass(frozen=True)
class Recipe:
    """How a plan becomes requests; `subset` are the source's numbers that the plan's numbers stand for."""

    plan: Plan
    num_frames: int
    augment: AugmentConfig
    subset: np.ndarray = field(compare=False)

    def batches(self, source: ClipSource, asked: Pass) -> Iterator[Sequence[Request]]:
        """This rank's micro-batches."""
        hflip = hflip_chance(self.augment, source.class_names)
        parts = self.plan.evaluation() if asked.epoch is None else self.plan.training(asked.epoch, asked.consumed)
        return (list(self._requests(source, asked.epoch, part, hflip)) for part in parts)

    def _requests(self, source: ClipSource, epoch: int | None, part: Part, hflip: float) -> Iterator[Request]:
        height, width = source.stored.height, source.stored.width
        for number, position in zip(self.subset[part.numbers].tolist(), part.positions.tolist(), strict=True):
            if epoch is None:
                yield Request(number, position, partial(_frames, self.num_frames, None), whole_view(height, width))
            else:
                frame_draws, view_draws = training_draws(self.num_frames, self.plan.seed, epoch, source.facts[number].key)
                view = random_view(height, width, view_draws, self.augment, hflip)
                yield Request(number, position, partial(_frames, self.num_frames, frame_draws), view)


def _frames(num_frames: int, draws: np.ndarray | None, frames_valid: int) -> np.ndarray:
    return frames_uniform(num_frames, frames_valid, draws)
