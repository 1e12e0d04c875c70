"""What is asked of each clip of a pass: pure, and the same for every loader, in whichever process it decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .plan import Part, Plan
from .sample import AugmentConfig, View, choose_frames, hflip_chance, painted, random_view, training_draws
from .source import ChooseFrames, ClipSource
from .views import ONE_VIEW, Views, all_views


@dataclass(frozen=True)
class Pass:
    """An epoch of training from the position `consumed` (clips of finished steps) on; an epoch of None is one pass of evaluation.

    In evaluation each micro-batch comes once for each of its clips' `views`, these one after another.
    """

    epoch: int | None
    consumed: int = 0
    views: Views = ONE_VIEW


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
    sampling: str = "uniform"

    def batches(self, source: ClipSource, asked: Pass) -> Iterator[Sequence[Request]]:
        """This rank's micro-batches."""
        hflip = hflip_chance(self.augment, source.class_names)
        if asked.epoch is None:
            views = all_views(asked.views, self.num_frames, source.stored.height, source.stored.width)
            return (list(self._seen(part, draws, view)) for part in self.plan.evaluation() for draws, view in views)
        return (list(self._requests(source, asked.epoch, part, hflip)) for part in self.plan.training(asked.epoch, asked.consumed))

    def _seen(self, part: Part, draws: np.ndarray | None, view: View) -> Iterator[Request]:
        for number, position in zip(self.subset[part.numbers].tolist(), part.positions.tolist(), strict=True):
            yield Request(number, position, partial(choose_frames, self.sampling, self.num_frames, draws), view)

    def _requests(self, source: ClipSource, epoch: int, part: Part, hflip: float) -> Iterator[Request]:
        height, width = source.stored.height, source.stored.width
        for number, position in zip(self.subset[part.numbers].tolist(), part.positions.tolist(), strict=True):
            chance = (self.plan.seed, epoch, source.facts[number].key, position % self.plan.repeats)
            frame_draws, view_draws = training_draws(self.num_frames, *chance)
            view = painted(random_view(height, width, view_draws, self.augment, hflip), self.augment, *chance)
            yield Request(number, position, partial(choose_frames, self.sampling, self.num_frames, frame_draws), view)
