"""The loader: a webdataset.DataPipeline whose source is our plan.

plan: numbers of a batch -> decode ahead in threads -> crop, resize, flip on the device -> Batch

WebDataset's own shard splitting and shuffling are not used: they repeat their order every epoch, split shards and not
clips over ranks, and cannot resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset

from clips.clip import ClipSpec
from clips.environment import cpus_of_rank, ranks
from clips.errors import InputError
from clips.registry import check_name

from . import LOADERS
from .batch import Batch
from .decode import DecodePool, PendingBatch, RawBatch, Request
from .device import Finisher
from .plan import Plan
from .sample import AugmentConfig, View, frames_uniform, hflip_chance, random_view, training_draws, whole_view
from .source import ClipSource

MAX_THREADS = 8
MakeRequest = Callable[[int], Request]  # from a clip's number in the source


@dataclass(frozen=True)
class LoaderConfig:
    """How clips are read."""

    dataset_home: Path
    """The folder of shards that pack wrote, or the unconverted folder of npz snippets."""
    loader: str = "auto"
    """webdataset, npz, or auto: whichever fits the folder."""
    threads: int | None = None
    """Decoding threads of each rank; default: the cores that this rank may use, at most 8."""
    prefetch: int = 2
    """Micro-batches decoded ahead of the step; each holds its full stored frames in memory."""

    def __post_init__(self) -> None:
        if self.loader != "auto":
            check_name(LOADERS, self.loader, "--loader")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: expected at least 1.")
        if self.prefetch < 1:
            raise InputError(f"--prefetch {self.prefetch}: expected at least 1.")


def default_threads() -> int:
    """The cores that this rank may use, at most 8: more than a GPU's worth of clips needs."""
    return min(MAX_THREADS, cpus_of_rank(ranks()))


class Loader:
    """One split on one rank. `spec` is what the model eats; `subset` restricts to some of the source's clips."""

    def __init__(
        self,
        source: ClipSource,
        plan: Plan,
        spec: ClipSpec,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
        subset: list[int] | None = None,
        augment: AugmentConfig | None = None,
        with_points: bool = False,
    ) -> None:
        self.source, self.plan, self.spec = source, plan, spec
        self._subset = np.asarray(subset if subset is not None else range(len(source.facts)))
        if len(self._subset) != plan.num_clips:
            raise ValueError(f"a plan of {plan.num_clips} clips for {len(self._subset)}")
        self._augment = augment or AugmentConfig()
        self._hflip = hflip_chance(self._augment, source.class_names)
        self._prefetch = prefetch
        self._pool = DecodePool(source, spec.frames, plan.micro_batch, threads, with_points, pinned=device.type == "cuda")
        self._finisher = Finisher(source, spec, device, with_points)

    def training(self, epoch: int, consumed: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch, from the position `consumed` (clips of finished steps) on; nothing is read to be skipped."""
        return self._batches(self.plan.training(epoch, consumed), partial(self._training_request, epoch))

    def evaluation(self) -> Iterator[Batch]:
        """This rank's share of one pass over every clip: whole frames, the middle of each segment, no chance."""
        return self._batches(self.plan.evaluation(), self._evaluation_request)

    def _batches(self, numbers: Iterable[np.ndarray], request: MakeRequest) -> Iterator[Batch]:
        pipeline = webdataset.DataPipeline(lambda: iter(numbers), partial(self._ahead, request), self._finished)
        return iter(pipeline)

    def _ahead(self, request: MakeRequest, batches: Iterator[np.ndarray]) -> Iterator[RawBatch]:
        """Decoded batches in the plan's order, `prefetch` of them under way while the last one is used."""
        pending: deque[PendingBatch] = deque()
        try:
            for numbers in batches:
                pending.append(self._pool.submit([request(int(self._subset[number])) for number in numbers]))
                if len(pending) > self._prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for batch in pending:
                batch.abandon()

    def _finished(self, batches: Iterator[RawBatch]) -> Iterator[Batch]:
        for raw in batches:
            yield self._finisher.finish(raw)

    def _training_request(self, epoch: int, number: int) -> Request:
        frame_draws, view_draws = training_draws(self.spec.frames, self.plan.seed, epoch, self.source.facts[number].key)
        stored = self.source.stored
        view = random_view(stored.height, stored.width, view_draws, self._augment, self._hflip)
        return Request(number, partial(_frames, self.spec.frames, frame_draws), view)

    def _evaluation_request(self, number: int) -> Request:
        return Request(number, partial(_frames, self.spec.frames, None), self._whole())

    def _whole(self) -> View:
        return whole_view(self.source.stored.height, self.source.stored.width)

    def close(self) -> None:
        self._pool.close()
        self.source.close()


def _frames(num_frames: int, draws: np.ndarray | None, frames_valid: int) -> np.ndarray:
    return frames_uniform(num_frames, frames_valid, draws)
