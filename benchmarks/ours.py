"""Our loader to the places where its work ends on a CPU: finished batches, and stored frames ready to be uploaded to a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from clips.clip import ClipSpec
from clips.errors import InputError
from loaders.beside import Beside, Job
from loaders.decode import DecodeThreads, Effort, FreeList, RawBatch
from loaders.plan import Plan
from loaders.requests import Pass, Recipe
from loaders.sample import AugmentConfig
from loaders.source import ClipSource, open_source
from loaders.stream import LOOK_AHEAD, Loader

from .floor import EPOCH, SEED, PassClips

Where = Literal["threads", "process"]
PREFETCH = 2  # micro-batches, the loader's default


@dataclass(frozen=True)
class Setting:
    """How our loader is asked to work."""

    spec: ClipSpec
    batch: int
    threads: int
    look_ahead: int = LOOK_AHEAD

    @property
    def effort(self) -> Effort:
        return Effort(self.threads, PREFETCH, self.look_ahead)


def opened(home: Path, chosen: PassClips, loader: str = "auto") -> ClipSource:
    """A source of either kind that holds the clips of the pass."""
    source = open_source(home, chosen.split, loader)
    if missing := {clip.key for clip in chosen.clips} - {fact.key for fact in source.facts}:
        source.close()
        raise InputError(f"{home}: split {chosen.split} has no clip '{min(missing)}', the shards have. Give the folder that they were packed from.")
    return source


def recipe_of(source: ClipSource, chosen: PassClips, setting: Setting) -> Recipe:
    """Epoch after epoch the same clips, in full batches."""
    keys = {clip.key for clip in chosen.clips}
    numbers = np.tile([number for number, fact in enumerate(source.facts) if fact.key in keys], chosen.times)
    return Recipe(Plan(len(numbers), setting.batch, setting.batch, SEED), setting.spec.frames, AugmentConfig(), numbers)


class Finished:
    """Batches as a training on a CPU gets them."""

    def __init__(self, chosen: PassClips, setting: Setting, source: ClipSource) -> None:
        recipe = recipe_of(source, chosen, setting)
        self.loader = Loader(
            source, recipe.plan, setting.spec, torch.device("cpu"), setting.threads, PREFETCH, recipe.subset.tolist(), look_ahead=setting.look_ahead
        )

    def clips(self) -> Iterator[int]:
        for batch in self.loader.training(EPOCH):
            yield len(batch)

    def close(self) -> None:
        self.loader.close()


class HandedOver:
    """Stored frames in the memory that a GPU would be fed from, decoded by threads here or in a process beside; no crop, no resize."""

    def __init__(self, chosen: PassClips, setting: Setting, where: Where, source: ClipSource) -> None:
        self._source = source
        recipe = recipe_of(source, chosen, setting)
        stored = ClipSpec(setting.spec.frames, source.stored.height, source.stored.width)
        self._run, self._close = _decoder(source, recipe, setting.effort, (setting.batch, *stored.video_shape), where)

    def batches(self) -> Iterator[RawBatch]:
        """Each to be released."""
        return self._run(Pass(EPOCH))

    def clips(self) -> Iterator[int]:
        for raw in self.batches():
            if errors := [outcome.error for outcome in raw.outcomes if outcome.loaded is None]:
                raise InputError(errors[0])
            raw.release()
            yield len(raw.requests)

    def close(self) -> None:
        self._close()
        self._source.close()


def _decoder(
    source: ClipSource, recipe: Recipe, effort: Effort, shape: Sequence[int], where: Where
) -> tuple[Callable[[Pass], Iterator[RawBatch]], Callable[[], None]]:
    """What runs a pass, and what ends it all."""
    if where == "process":
        beside = Beside(Job(source, recipe, effort, False, (effort.prefetch + 1, *shape), None, logging.WARNING))
        return beside.run, beside.close
    threads = DecodeThreads(source, FreeList(lambda: np.empty(shape, np.uint8)), effort, False)
    return lambda asked: threads.run(recipe.batches(source, asked)), threads.close
