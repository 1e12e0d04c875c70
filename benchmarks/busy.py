"""Where decoding threads should live: in the training's process, or in one process beside, while the main thread launches operations without pause.

The main thread adds to a one-element tensor again and again, as a training launches kernels, and takes a batch of stored frames
whenever one is ready. So it never waits, and decoding never stops: what the two take from each other shows in both rates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from clips.clip import ClipSpec
from clips.errors import InputError
from loaders.beside import Beside, Job
from loaders.decode import DecodeThreads, Effort, FreeList, RawBatch, StoredFrames
from loaders.requests import Pass, Recipe
from loaders.sample import View
from loaders.source import ClipSource, open_source

from .floor import EPOCH, PassClips, pass_clips
from .loader import BATCH
from .ours import PREFETCH, Setting, recipe_of
from .result import Result, as_word, cell, file_system_of, result, table, write_results

ALONE = "no loader"
LAUNCHES_A_LOOK = 100  # between two looks whether a batch is ready: about a tenth of a millisecond
SETTLE_S = 0.2  # the loader before fills its buffers, then it rests
PASSES = 1000  # so many times over the clips: no pass ends while something is measured


@dataclass(frozen=True)
class BusyConfig:
    """Launches and clips a second of a busy main thread beside decoding threads and beside a decoding process."""

    shards: Path
    """Packed clips."""
    split: str = "train"
    """Which split to read."""
    frames: int = 16
    """Frames of a clip."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of decoding threads to try."""
    seconds: float = 2.0
    """Of each measurement."""
    rounds: int = 5
    """Measurements of each way, after one that warms up."""
    json: Path | None = None
    """Append the results here."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.seconds <= 0 or not self.threads or min(self.threads) < 1:
            raise InputError(f"--rounds {self.rounds} --seconds {self.seconds} --threads {' '.join(map(str, self.threads))}: expected more than 0.")


Values = dict[str, list[float]]  # name of a way to one value a round


class Stream(Protocol):
    """Batches without end, in a way that can be looked at."""

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""

    def take(self) -> int:
        """The clips of the next batch, which it lets go at once."""

    def close(self) -> None:
        """Ends the decoding."""


Start = Callable[[ClipSource, Recipe, Effort, tuple[int, ...]], Stream]  # of batches of that shape


def bench_busy(config: BusyConfig) -> list[Result]:
    """Prints a table and gives the results."""
    chosen = pass_clips(config.shards, config.split, config.frames, BATCH, 1)
    kinds: dict[str, Start] = {"threads": Threads, "process": Process}
    ways: dict[str, Stream | None] = {ALONE: None}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for threads in config.threads:
            for kind, start in kinds.items():
                ways[f"{kind}, {threads}"] = _started(start, chosen, threads, config)
        launches, starved, clips = _measured(ways, config)
    finally:
        torch.set_num_threads(before)
        for stream in ways.values():
            if stream:
                stream.close()
    share = {name: [100 * (a / b) for a, b in zip(values, launches[ALONE], strict=True)] for name, values in launches.items()}
    setting = {"frames": config.frames, "batch": BATCH, "seconds": config.seconds}
    found = [("launches", "1/s", launches), ("launch_share", "%", share), ("without_core", "%", starved), ("speed", "clips/s", clips)]
    results = [result(f"busy/{as_word(name)}/{kind}", unit, values, setting) for kind, unit, of in found for name, values in of.items()]
    rows = [[name, *(cell(of[name], 0) if name in of else "-" for _, _, of in found)] for name in ways]
    print(table(["decoding in", "launches/s", "of those alone, %", "waiting for a core, %", "clips/s"], rows))
    print("Where the main thread waits for a core, there are too few of them for this measurement, or others use them.")
    if config.json:
        write_results(config.json, results, file_system_of(config.shards))
    return results


def _started(start: Start, chosen: PassClips, threads: int, config: BusyConfig) -> Stream:
    source = open_source(chosen.home, chosen.split)
    spec = ClipSpec(config.frames, source.stored.height, source.stored.width)
    setting = Setting(spec, min(BATCH, chosen.num_clips), threads)
    recipe = recipe_of(source, replace(chosen, times=PASSES), setting)
    return start(source, recipe, setting.effort, (setting.batch, *spec.video_shape))


def _measured(ways: Mapping[str, Stream | None], config: BusyConfig) -> tuple[Values, Values, Values]:
    """Launches/s, share of the time without a core in % and clips/s of each way in each round, every second round backwards."""
    launches: Values = {name: [] for name in ways}
    starved: Values = {name: [] for name in ways}
    clips: Values = {name: [] for name, stream in ways.items() if stream}
    for number in range(config.rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            time.sleep(SETTLE_S)
            launches_per_s, starved_share, clips_per_s = _launch(config.seconds, ways[name])
            if number:
                launches[name].append(launches_per_s)
                starved[name].append(starved_share)
                if name in clips:
                    clips[name].append(clips_per_s)
    return launches, starved, clips


def _launch(seconds: float, stream: Stream | None) -> tuple[float, float, float]:
    """Launches a second of the main thread, which never waits by itself, its time without a core in %, and clips a second."""
    if stream:
        for _ in range(PREFETCH + 2):  # those that were decoded while nobody asked
            stream.take()
    value = torch.zeros(1)
    launches = clips = 0
    starved_s, begin = _without_core_s(), time.perf_counter()
    while time.perf_counter() < begin + seconds:
        for _ in range(LAUNCHES_A_LOOK):
            value.add_(1)
        launches += LAUNCHES_A_LOOK
        if stream and stream.is_ready():
            clips += stream.take()
    wall_s = time.perf_counter() - begin
    return launches / wall_s, 100 * (_without_core_s() - starved_s) / wall_s, clips / wall_s


def _without_core_s() -> float:
    """How long this thread could have run and was not given a core; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


class Threads:
    """Decoding threads of this process."""

    def __init__(self, source: ClipSource, recipe: Recipe, effort: Effort, shape: tuple[int, ...]) -> None:
        self._source, self._shape, self._ended, self._taken = source, shape, count(), 0
        self._num_ended = 0
        self._decoder = DecodeThreads(source, FreeList(lambda: np.empty(shape, np.uint8)), effort, False, self._watched)
        self._batches = self._decoder.run(recipe.batches(source, Pass(EPOCH)))

    def _watched(self, out: np.ndarray, view: View) -> WatchedClip:
        return WatchedClip(out, view, self._one_more)

    def _one_more(self) -> None:
        self._num_ended = next(self._ended) + 1

    def is_ready(self) -> bool:
        return self._num_ended >= self._taken + self._shape[0]

    def take(self) -> int:
        taken = _let_go(next(self._batches))
        self._taken += taken
        return taken

    def close(self) -> None:
        self._batches.close()  # type: ignore[attr-defined]  # a generator
        self._decoder.close()
        self._source.close()


class WatchedClip(StoredFrames):
    """Tells when the clip's last frame is there."""

    def __init__(self, out: np.ndarray, view: View, ended: Callable[[], None]) -> None:
        super().__init__(out, view)
        self._last, self._ended = len(out) - 1, ended

    def done(self, number: int) -> None:
        if number == self._last:
            self._ended()


class Process:
    """Decoding threads of a process beside."""

    def __init__(self, source: ClipSource, recipe: Recipe, effort: Effort, shape: tuple[int, ...]) -> None:
        self._source = source
        self._beside = Beside(Job(source, recipe, effort, False, (effort.prefetch + 1, *shape), None, logging.WARNING))
        self._batches: Iterator[RawBatch] = self._beside.run(Pass(EPOCH))

    def is_ready(self) -> bool:
        return self._beside._channel.poll()  # a training has no need to look: it takes its batch, and waits

    def take(self) -> int:
        return _let_go(next(self._batches))

    def close(self) -> None:
        self._beside.close()
        self._source.close()


def _let_go(raw: RawBatch) -> int:
    if errors := [outcome.error for outcome in raw.outcomes if outcome.loaded is None]:
        raise InputError(errors[0])
    raw.release()
    return len(raw.requests)
