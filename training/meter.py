"""How fast training is and how long it waits for data, on the host's clock: nothing here waits for the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Slowest(Protocol):
    """The clip of a batch that took longest: its stage (read or decode) and the file that it came from."""

    @property
    def stage(self) -> str: ...

    @property
    def file(self) -> str: ...


class Traced(Protocol):
    """A batch that knows what it waited for."""

    @property
    def slowest(self) -> Slowest: ...


TracedBatch = TypeVar("TracedBatch", bound=Traced)


@dataclass(frozen=True, order=True)
class Wait:
    """One wait for data, and what the batch itself waited for longest."""

    ms: float = 0.0
    stage: str = ""
    file: str = ""


@dataclass
class Span:
    """What was counted since `start_s`."""

    start_s: float
    num_clips: int = 0
    num_steps: int = 0
    wait_s: float = 0.0
    longest: Wait = Wait()

    def report(self, now_s: float) -> dict[str, float]:
        """Clips per second, milliseconds of a step and the part of it that waited for data; empty when no step was counted."""
        elapsed_s = now_s - self.start_s
        if self.num_steps == 0 or elapsed_s <= 0:
            return {}
        return {
            "clips_per_s": self.num_clips / elapsed_s,
            "step_ms": 1000 * elapsed_s / self.num_steps,
            "data_wait_percent": 100 * self.wait_s / elapsed_s,
        }


class Meter:
    """Speed of an interval and of an epoch.

    Everything between two reports counts, also writing logs: a step's real price. The GPU works behind the host, so one interval is exact
    only to the steps in flight, and a wait for data need not stall the GPU: `data_wait_percent` is the most that better loading can win.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._interval = Span(clock())
        self._epoch = Span(clock())

    def take(self, batches: Iterator[TracedBatch]) -> TracedBatch:
        """The next batch; the time until it is there counts as a wait for data."""
        start_s = self._clock()
        batch = next(batches)
        waited_s = self._clock() - start_s
        self._interval.wait_s += waited_s
        self._epoch.wait_s += waited_s
        self._interval.longest = max(self._interval.longest, Wait(1000 * waited_s, batch.slowest.stage, batch.slowest.file))
        return batch

    @property
    def longest_wait(self) -> Wait:
        """Of the interval since the last report."""
        return self._interval.longest

    def step(self, num_clips: int) -> None:
        """Counts one optimiser step; `num_clips` over all ranks gives the training's speed, of this rank its own."""
        for span in (self._interval, self._epoch):
            span.num_clips += num_clips
            span.num_steps += 1

    def report(self) -> dict[str, float]:
        """The interval since the last report; a new one begins."""
        now_s = self._clock()
        report = self._interval.report(now_s)
        self._interval = Span(now_s)
        return report

    def report_epoch(self) -> dict[str, float]:
        """Everything since the last epoch report; a new epoch and a new interval begin."""
        now_s = self._clock()
        report = self._epoch.report(now_s)
        self._interval, self._epoch = Span(now_s), Span(now_s)
        return report
