"""Threads that read clips ahead and decode them straight into reused batch buffers.

requests -> read ahead, sorted by file and place -> decode, a task a clip (without the GIL) -> RawBatch in the order asked
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from clips.errors import ClipError

from .requests import Request
from .sample import View
from .source import ClipSource, Fetched, Frames, Loaded

READERS = 8  # threads that wait for storage: on a slow file system the number of reads under way at once


@dataclass(frozen=True)
class Outcome:
    """What became of one request: the clip, or why it cannot be read; how long reading and decoding took, in s."""

    loaded: Loaded | None
    error: str
    read_s: float
    decode_s: float


@dataclass(frozen=True)
class RawBatch:
    """Decoded frames uint8 (B, T, H, W, 3) in a buffer on the host that `release` gives back; zeros where there is an error."""

    video: np.ndarray
    requests: Sequence[Request]
    outcomes: Sequence[Outcome]
    release: Callable[[], None]


class Slots(Protocol):
    """The batch buffers."""

    def take(self, wait: bool) -> tuple[np.ndarray, Callable[[], None]] | None:
        """A free buffer uint8 (B, T, H, W, 3) and what gives it back; None where all are in use and it is not to `wait`."""


MakeFrames = Callable[[np.ndarray, View], Frames]  # from a clip's part of the buffer (T, H, W, 3) and its view


class StoredFrames:
    """Frames written as they are stored; crop and resize come later, on the device."""

    def __init__(self, out: np.ndarray, view: View) -> None:
        self._out = out

    def place(self, number: int) -> np.ndarray:
        frame: np.ndarray = self._out[number]
        return frame

    def done(self, number: int) -> None:
        """It lies where it belongs."""


@dataclass(frozen=True)
class Effort:
    """How much is done at once: decoding threads, micro-batches decoded ahead, clips read ahead of decoding (0: as they are decoded)."""

    threads: int
    prefetch: int
    look_ahead: int


@dataclass
class Reading:
    """A micro-batch whose clips are being read; no future where decoding reads by itself."""

    requests: Sequence[Request]
    futures: list[Future[tuple[Fetched, float]] | None]


class Pending:
    """A micro-batch that is being decoded."""

    def __init__(self, video: np.ndarray, reading: Reading, futures: Sequence[Future[Outcome]], release: Callable[[], None]) -> None:
        self._video, self._reading, self._futures, self._release = video, reading, futures, release

    def result(self) -> RawBatch:
        """Waits."""
        outcomes = [future.result() for future in self._futures]
        return RawBatch(self._video[: len(outcomes)], self._reading.requests, outcomes, self._release)

    def abandon(self) -> None:
        """Ends the work on it, finished or not, and frees its buffer."""
        for future in self._futures:
            future.cancel()
        for future in self._futures:
            if not future.cancelled():
                future.exception()
        _drop(self._reading)
        self._release()


class DecodeThreads:
    """Reads and decodes batches of requests in threads of this process."""

    def __init__(
        self,
        source: ClipSource,
        slots: Slots,
        effort: Effort,
        with_points: bool,
        make_frames: MakeFrames = StoredFrames,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self._source, self._slots, self._effort, self._with_points, self._make_frames = source, slots, effort, with_points, make_frames
        self._decoders = ThreadPoolExecutor(effort.threads, "decode", initializer)
        self._readers = ThreadPoolExecutor(READERS, "read") if effort.look_ahead else None

    def run(self, batches: Iterable[Sequence[Request]]) -> Iterator[RawBatch]:
        """Decoded batches in the order asked, `prefetch` of them under way while the last one is used."""
        ahead = self._read_ahead(iter(batches))
        pending: deque[Pending] = deque()
        reading: Reading | None = None
        try:
            while True:
                while len(pending) <= self._effort.prefetch:
                    reading = reading or next(ahead, None)
                    slot = self._slots.take(wait=not pending) if reading else None
                    if reading is None or slot is None:
                        break
                    pending.append(self._decode(reading, *slot))
                    reading = None
                if not pending:
                    return
                raw = pending[0].result()  # one that fails stays among those to abandon
                pending.popleft()
                yield raw
        finally:
            for batch in pending:
                batch.abandon()
            if reading:
                _drop(reading)
            ahead.close()

    def _read_ahead(self, batches: Iterator[Sequence[Request]]) -> Generator[Reading, None, None]:
        """Each batch once the reads of `look_ahead` clips after it are under way; half of them are asked for at a time, sorted by place."""
        queue: deque[Reading] = deque()
        num_clips = 0
        try:
            while True:
                if num_clips <= self._effort.look_ahead // 2:
                    num_clips += self._ask(batches, max(1, self._effort.look_ahead - num_clips), queue)
                if not queue:
                    return
                num_clips -= len(queue[0].requests)
                yield queue.popleft()
        finally:
            for reading in queue:
                _drop(reading)

    def _ask(self, batches: Iterator[Sequence[Request]], num_clips: int, queue: deque[Reading]) -> int:
        """Begins to read the next batches until they hold that many clips; gives how many they hold."""
        found: list[Reading] = []
        while sum(len(reading.requests) for reading in found) < num_clips and (requests := next(batches, None)) is not None:
            found.append(Reading(requests, [None] * len(requests)))
        queue.extend(found)
        if self._readers:
            places = [(reading, place) for reading in found for place in range(len(reading.requests))]
            for reading, place in sorted(places, key=lambda pair: self._source.where(pair[0].requests[pair[1]].number)):
                reading.futures[place] = self._readers.submit(self._fetch, reading.requests[place])
        return sum(len(reading.requests) for reading in found)

    def _decode(self, reading: Reading, video: np.ndarray, release: Callable[[], None]) -> Pending:
        tasks = zip(reading.requests, reading.futures, video, strict=False)  # the last batch of an evaluation may be short
        return Pending(video, reading, [self._decoders.submit(self._load, *task) for task in tasks], release)

    def _fetch(self, request: Request) -> tuple[Fetched, float]:
        start_s = time.perf_counter()
        return self._source.fetch(request.number, request.choose, self._with_points), time.perf_counter() - start_s

    def _load(self, request: Request, read: Future[tuple[Fetched, float]] | None, out: np.ndarray) -> Outcome:
        read_s, start_s = 0.0, time.perf_counter()
        try:
            fetched, read_s = read.result() if read else self._fetch(request)
            start_s = time.perf_counter()
            loaded = fetched.decode(self._make_frames(out, request.view))
        except ClipError as error:
            out[...] = 0
            return Outcome(None, str(error), read_s, time.perf_counter() - start_s)
        return Outcome(loaded, "", read_s, time.perf_counter() - start_s)

    def close(self) -> None:
        self._decoders.shutdown(wait=True, cancel_futures=True)
        if self._readers:
            self._readers.shutdown(wait=True, cancel_futures=True)


def _drop(reading: Reading) -> None:
    """Gives back the buffers of clips that nobody decodes any more."""
    for future in reading.futures:
        if future and not future.cancel():
            future.add_done_callback(_release)


def _release(future: Future[tuple[Fetched, float]]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result()[0].release()


class FreeList:
    """Slots of this process: as many as are in flight, kept for the next batches."""

    def __init__(self, make: Callable[[], np.ndarray]) -> None:
        self._make = make
        self._free: list[np.ndarray] = []

    def take(self, wait: bool) -> tuple[np.ndarray, Callable[[], None]]:
        buffer = self._free.pop() if self._free else self._make()
        return buffer, partial(self._free.append, buffer)
