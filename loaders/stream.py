"""The loader: a webdataset.DataPipeline whose source is our plan.

plan -> requests -> read ahead and decode in threads, here or in a process beside -> finish on the device -> Batch

WebDataset's own shard splitting and shuffling are not used: they repeat their order every epoch, split shards and not
clips over ranks, and cannot resume.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import webdataset

from clips.clip import ClipSpec
from clips.environment import cpus_of_rank, ranks
from clips.errors import ClipError, InputError
from clips.registry import check_name

from . import LOADERS
from .batch import Batch
from .beside import Beside, Job
from .decode import DecodeThreads, Effort, FreeList, RawBatch
from .device import FinishingFrames, one_thread
from .finish import Finisher, Resized
from .plan import Plan
from .requests import Pass, Recipe
from .sample import AugmentConfig
from .source import ClipSource
from .views import ONE_VIEW, Views

MAX_THREADS = 8
LOOK_AHEAD = 32
HW_DECODER_LOAD = 0.65  # DALI's own default; not yet measured here

DecodeIn = Literal["auto", "threads", "process"]


@dataclass(frozen=True)
class LoaderConfig:
    """How clips are read."""

    dataset_home: Path
    """The folder of shards that pack wrote, or the unconverted folder of npz snippets."""
    loader: str = "auto"
    """webdataset, npz, dali (shards, decoded and resized on the GPU by NVIDIA DALI), or auto: webdataset or npz, whichever fits the folder."""
    threads: int | None = None
    """Decoding threads of each rank; default: the cores that this rank may use, at most 8."""
    prefetch: int = 2
    """Micro-batches decoded ahead of the step."""
    look_ahead: int = LOOK_AHEAD
    """Clips read ahead of decoding, sorted by place; 0 reads each clip when it is decoded."""
    decode_in: DecodeIn = "auto"
    """Where the threads live: in the training's process, or in one process beside it. auto: beside it for a GPU."""
    stage_dir: Path | None = None
    """A folder on a local disk, such as $TMPDIR: shards are copied there in the background and read from there."""
    max_bad_clips: int = 0
    """Clips that may be unreadable in an epoch, over all ranks: they stay in their batches with weight 0 and are named; in evaluation they are left out."""
    hw_decoder_load: float = HW_DECODER_LOAD
    """Of the frames, the share that --loader dali gives to the GPU's JPEG engine, where it has one: 0 … 1. Kept when a run goes on: pixels depend on it."""

    def __post_init__(self) -> None:
        if self.loader != "auto":
            check_name(LOADERS, self.loader, "--loader")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: expected at least 1.")
        if self.prefetch < 1:
            raise InputError(f"--prefetch {self.prefetch}: expected at least 1.")
        if self.look_ahead < 0:
            raise InputError(f"--look-ahead {self.look_ahead}: expected at least 0.")
        if self.max_bad_clips < 0:
            raise InputError(f"--max-bad-clips {self.max_bad_clips}: expected at least 0.")
        if not 0 <= self.hw_decoder_load <= 1:
            raise InputError(f"--hw-decoder-load {self.hw_decoder_load}: expected 0 … 1.")


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
        subset: Sequence[int] | None = None,
        augment: AugmentConfig | None = None,
        with_points: bool = False,
        look_ahead: int = LOOK_AHEAD,
        decode_in: DecodeIn = "auto",
        stage_dir: Path | None = None,
        max_bad_clips: int = 0,
        sampling: str = "uniform",
        hw_decoder_load: float = HW_DECODER_LOAD,
    ) -> None:
        self.source, self.plan, self.spec = source, plan, spec
        numbers = np.asarray(subset if subset is not None else range(len(source.facts)))
        if len(numbers) != plan.num_clips:
            raise ValueError(f"a plan of {plan.num_clips} clips for {len(numbers)}")
        self._max_bad_clips = max_bad_clips
        recipe = Recipe(plan, spec.frames, augment or AugmentConfig(), numbers, sampling)
        effort = Effort(threads, prefetch, look_ahead)
        on_gpu = device.type == "cuda"
        self._graph = source.graph(spec, plan.micro_batch, device, threads, hw_decoder_load)
        beside = decode_in == "process" or (decode_in == "auto" and on_gpu)
        finished = spec if self._graph is None and not beside and not on_gpu else None
        row_shape = self._graph.row_shape if self._graph else (source.stored.height, source.stored.width, 3)
        make = partial(_in_process, row_shape=row_shape) if beside else partial(_in_threads, row_shape=row_shape, finished=finished)
        self._run, self._close = make(source, recipe, effort, with_points, pinned=on_gpu, stage_dir=stage_dir)
        upload = torch.cuda.Stream(device) if on_gpu and self._graph is None else None
        self._finisher = Finisher(source, spec, device, with_points, finished is not None, upload)

    def training(self, epoch: int, consumed: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch, from the position `consumed` (clips of finished steps) on; nothing is read to be skipped.

        Raises ClipError for a clip that cannot be read, once this rank has more of them in this pass than `max_bad_clips`.
        """
        return self._batches(Pass(epoch, consumed))

    def evaluation(self, views: Views = ONE_VIEW) -> Iterator[Batch]:
        """This rank's share of one pass over every clip, without chance; a batch comes once for each of the views, one after another.

        The first view, and the only one by default, is of whole frames and the middle of each segment.
        """
        return self._batches(Pass(None, views=views))

    def _batches(self, asked: Pass) -> Iterator[Batch]:
        on_device = [self._graph.run] if self._graph else []
        pipeline = webdataset.DataPipeline(lambda: self._run(asked), *on_device, partial(self._finished, asked.epoch))
        return iter(pipeline)

    def _finished(self, epoch: int | None, batches: Iterator[RawBatch | Resized]) -> Iterator[Batch]:
        bad: set[str] = set()  # a clip counts once, however often it comes: in several views, or repeated
        for raw in batches:
            batch = self._finisher.finish(raw, epoch)
            bad |= {clip.key for clip in batch.bad}
            if len(bad) > self._max_bad_clips:
                budget = f" That is bad clip {len(bad)} of a pass; --max-bad-clips allows {self._max_bad_clips}." if self._max_bad_clips else ""
                raise ClipError(batch.bad[-1].reason + budget)
            yield batch

    def close(self) -> None:
        if self._graph:
            self._graph.close()
        self._close()
        self.source.close()


Decoder = tuple[Callable[[Pass], Iterator[RawBatch]], Callable[[], None]]  # what runs a pass, and what ends it all


def _in_threads(
    source: ClipSource,
    recipe: Recipe,
    effort: Effort,
    with_points: bool,
    row_shape: tuple[int, ...],
    pinned: bool,
    stage_dir: Path | None,
    finished: ClipSpec | None,
) -> Decoder:
    """Threads of this process, which write each frame as uint8 of `row_shape`; with `finished` they also resize."""
    shape = (recipe.plan.micro_batch, recipe.num_frames, *((finished.height, finished.width, 3) if finished else row_shape))
    slots = FreeList(lambda: torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).numpy())
    if finished:
        threads = DecodeThreads(source, slots, effort, with_points, FinishingFrames(source.stored, (finished.height, finished.width)), one_thread)
    else:
        threads = DecodeThreads(source, slots, effort, with_points)
    if stage_dir:
        source.stage(stage_dir)
    return lambda asked: threads.run(recipe.batches(source, asked)), threads.close


def _in_process(
    source: ClipSource, recipe: Recipe, effort: Effort, with_points: bool, row_shape: tuple[int, ...], pinned: bool, stage_dir: Path | None
) -> Decoder:
    """Threads of a process beside this one."""
    shape = (effort.prefetch + 1, recipe.plan.micro_batch, recipe.num_frames, *row_shape)
    job = Job(source, recipe, effort, with_points, shape, stage_dir, logging.getLogger().getEffectiveLevel())
    beside = Beside(job, _pin if pinned else None)
    return beside.run, beside.close


def _pin(slots: np.ndarray) -> Callable[[], None]:
    """Tells CUDA that this memory stays where it is, so that uploads need no copy; gives what takes that back."""
    runtime = torch.cuda.cudart()
    found = runtime.cudaHostRegister(slots.ctypes.data, slots.nbytes, 0)
    if int(found) != 0:
        logging.getLogger(__name__).warning(f"decoded batches cannot be pinned ({found}): uploads will be slower")
        return lambda: None
    return lambda: runtime.cudaHostUnregister(slots.ctypes.data)
