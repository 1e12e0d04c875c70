"""The meter on a clock that the test moves by hand."""

from __future__ import annotations

import pytest

from training.meter import Meter


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run_step(meter: Meter, clock: Clock, wait_s: float, work_s: float, num_clips: int = 8) -> None:
    with meter.waiting():
        clock.now_s += wait_s
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


def test_evaluation_is_not_training_but_logging_is() -> None:
    clock = Clock()
    meter = Meter(clock)
    run_step(meter, clock, wait_s=0, work_s=2)
    with meter.paused():
        clock.now_s += 1000
    clock.now_s += 2  # writing a log
    assert meter.report() == pytest.approx({"clips_per_s": 2.0, "step_ms": 4000.0, "data_wait_percent": 0.0})
    assert meter.report_epoch()["clips_per_s"] == pytest.approx(2.0)


def test_a_wait_that_ends_in_an_error_is_counted() -> None:
    clock = Clock()
    meter = Meter(clock)
    with pytest.raises(StopIteration), meter.waiting():
        clock.now_s += 1
        raise StopIteration
    clock.now_s += 1
    meter.step(8)
    assert meter.report()["data_wait_percent"] == pytest.approx(50.0)


def test_nothing_counted_gives_an_empty_report() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.report() == {}
    clock.now_s += 1
    assert meter.report_epoch() == {}
