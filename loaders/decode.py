"""Threads that read and decode clips ahead of the training step, straight into reused batch buffers.

numbers of a batch -> one task a clip: read, check, decode (all without the GIL) -> RawBatch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from clips.clip import ClipSpec

from .sample import View
from .source import ChooseFrames, ClipSource, Loaded


@dataclass(frozen=True)
class Request:
    """One clip to read: its number in the source, which frames of the valid ones, and the view taken of them later."""

    number: int
    choose: ChooseFrames
    view: View


@dataclass(frozen=True)
class RawBatch:
    """Decoded frames as stored: video uint8 (B, T, H, W, 3) on the host, in a buffer that `release` gives back."""

    video: torch.Tensor
    requests: Sequence[Request]
    clips: Sequence[Loaded]
    release: Callable[[], None]


class PendingBatch:
    """A batch whose clips are being decoded."""

    def __init__(self, buffer: torch.Tensor, requests: Sequence[Request], futures: Sequence[Future[Loaded]], release: Callable[[], None]) -> None:
        self._buffer, self._requests, self._futures, self._release = buffer, requests, futures, release

    def result(self) -> RawBatch:
        """Waits; raises ClipError for a clip that cannot be read."""
        clips = [future.result() for future in self._futures]
        return RawBatch(self._buffer[: len(clips)], self._requests, clips, self._release)

    def abandon(self) -> None:
        """Ends the work on it, finished or not, and frees its buffer."""
        for future in self._futures:
            future.cancel()
        for future in self._futures:
            if not future.cancelled():
                future.exception()
        self._release()


class DecodePool:
    """`threads` threads and as many reused buffers as are in flight; pinned where the batches go to a GPU."""

    def __init__(self, source: ClipSource, num_frames: int, batch: int, threads: int, with_points: bool, pinned: bool) -> None:
        self._source, self._with_points, self._pinned = source, with_points, pinned
        self._shape = (batch, *ClipSpec(num_frames, source.stored.height, source.stored.width).video_shape)
        self._free: list[torch.Tensor] = []
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def submit(self, requests: Sequence[Request]) -> PendingBatch:
        buffer = self._free.pop() if self._free else torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pinned)
        frames = buffer.numpy()
        futures = [self._threads.submit(self._load, request, frames[place]) for place, request in enumerate(requests)]
        return PendingBatch(buffer, requests, futures, partial(self._free.append, buffer))

    def _load(self, request: Request, out: np.ndarray) -> Loaded:
        return self._source.load(request.number, request.choose, out, self._with_points)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._free.clear()
