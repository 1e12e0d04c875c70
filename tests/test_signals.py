"""Signals and clocks that ask for a checkpoint, on one rank; tests of train.py send them to one of two."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from training.distributed import Group
from training.progress import Progress
from training.signals import SAVE_AND_END, StopAsked, Wishes

ALONE = Group(0, 1, 0, torch.device("cpu"), "single")


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("number", SAVE_AND_END)
def test_a_signal_is_told_at_the_poll_after_the_one_that_saw_it(number: signal.Signals) -> None:
    with Wishes(ALONE, 600) as wishes:
        assert not wishes.poll()
        os.kill(os.getpid(), number)
        assert not wishes.poll()  # said to the others
        with pytest.raises(StopAsked, match=number.name):
            wishes.poll()


def test_the_first_of_several_signals_is_the_reason_and_no_later_one_disturbs() -> None:
    with Wishes(ALONE, 600) as wishes:
        os.kill(os.getpid(), signal.SIGUSR2)
        wishes.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopAsked, match="SIGUSR2"):
            wishes.poll()
        os.kill(os.getpid(), signal.SIGTERM)  # while it saves: remembered, nothing else


def test_the_handlers_of_before_are_back_afterwards() -> None:
    before = [signal.getsignal(number) for number in SAVE_AND_END]
    with Wishes(ALONE, 600):
        assert all(signal.getsignal(number) != handler for number, handler in zip(SAVE_AND_END, before, strict=True))
    assert [signal.getsignal(number) for number in SAVE_AND_END] == before


def test_a_checkpoint_is_due_once_its_time_has_passed_and_again_that_long_after_it_was_written() -> None:
    clock = Clock()
    wishes = Wishes(ALONE, 60, clock)
    assert [wishes.poll(), wishes.poll()] == [False, False]
    clock.now_s = 61
    assert [wishes.poll(), wishes.poll()] == [False, True]
    clock.now_s = 70
    wishes.saved()
    assert [wishes.poll(), wishes.poll()] == [False, False]
    clock.now_s = 131
    assert [wishes.poll(), wishes.poll()] == [False, True]


def test_progress_comes_back_as_it_was() -> None:
    progress = Progress(step=7, trained=1, evaluated=1, consumed=12, loss_sum=2.5, loss_steps=3)
    assert progress.score(0.5, 1) and not progress.score(0.5, 2)
    other = Progress()
    other.load_state_dict(progress.state_dict())
    assert other == progress and other.best_epoch == 1 and other.evaluated == 2


@pytest.mark.parametrize(
    ("score", "best", "replaces"), [(0.5, None, True), (0.6, 0.5, True), (0.5, 0.5, False), (0.4, 0.5, False), (None, 0.5, False), (None, None, True)]
)
def test_the_best_epoch_is_the_earlier_of_equals_and_any_score_beats_none(score: float | None, best: float | None, replaces: bool) -> None:
    progress = Progress(best=best, best_epoch=3)
    assert progress.score(score, 4) is replaces
    assert (progress.best, progress.best_epoch) == ((score, 4) if replaces else (best, 3))
