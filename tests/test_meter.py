"""The meter on a clock that the test moves by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from training.meter import Meter, Wait


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class Trace:
    """What was slowest of a batch."""

    stage: str = "read"
    file: str = "train-000001"


READ = Trace()


@dataclass(frozen=True)
class Traced:
    """A batch, as far as the meter looks."""

    slowest: Trace = READ


def run_step(meter: Meter, clock: Clock, wait_s: float, work_s: float, num_clips: int = 8, slowest: Trace = READ) -> None:
    def loader() -> Iterator[Traced]:
        clock.now_s += wait_s
        yield Traced(slowest)

    meter.take(loader())
    clock.now_s += work_s
    meter.step(num_clips)


def test_speed_step_time_and_data_wait_of_an_interval() -> None:
    clock = Clock()
    meter = Meter(clock)
    for _ in range(4):
        run_step(meter, clock, wait_s=0.5, work_s=1.5)
    assert meter.report() == pytest.approx({"clips_per_s": 4.0, "step_ms": 2000.0, "data_wait_percent": 25.0})


def test_a_report_begins_a_new_interval_and_the_epoch_goes_on() -> None:
    clock = Clock()
    meter = Meter(clock)
    run_step(meter, clock, wait_s=1, work_s=1)
    meter.report()
    run_step(meter, clock, wait_s=0, work_s=2)
    assert meter.report() == pytest.approx({"clips_per_s": 4.0, "step_ms": 2000.0, "data_wait_percent": 0.0})
    assert meter.report_epoch() == pytest.approx({"clips_per_s": 4.0, "step_ms": 2000.0, "data_wait_percent": 25.0})
    run_step(meter, clock, wait_s=1, work_s=1)
    assert meter.report_epoch()["data_wait_percent"] == pytest.approx(50.0)
    assert meter.report() == {}  # the epoch's end is an interval's end too


def test_the_longest_wait_of_an_interval_is_told_with_its_stage_and_file() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.longest_wait == Wait(0, "", "")
    run_step(meter, clock, wait_s=0.5, work_s=1)
    run_step(meter, clock, wait_s=2, work_s=0, slowest=Trace("decode", "train-000007"))
    run_step(meter, clock, wait_s=1, work_s=9)
    assert meter.longest_wait == Wait(2000.0, "decode", "train-000007")
    meter.report()
    run_step(meter, clock, wait_s=1, work_s=1)
    assert meter.longest_wait == Wait(1000.0, "read", "train-000001")


def test_writing_a_log_counts_as_training() -> None:
    clock = Clock()
    meter = Meter(clock)
    run_step(meter, clock, wait_s=0, work_s=2)
    clock.now_s += 2
    assert meter.report() == pytest.approx({"clips_per_s": 2.0, "step_ms": 4000.0, "data_wait_percent": 0.0})


def test_nothing_counted_gives_an_empty_report() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.report() == {}
    clock.now_s += 1
    assert meter.report_epoch() == {}
