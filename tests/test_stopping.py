"""When a run has gone on for long enough without getting better."""

from __future__ import annotations

import pytest

from training.stopping import has_stalled


@pytest.mark.parametrize(
    ("epoch", "best_epoch", "patience", "stalled"),
    [(0, 0, 1, False), (1, 1, 1, False), (2, 1, 1, True), (5, 3, 3, False), (6, 3, 3, True), (9, 3, 3, True), (100, 0, None, False)],
)
def test_a_run_has_stalled_once_patience_epochs_ended_since_the_best(epoch: int, best_epoch: int, patience: int | None, stalled: bool) -> None:
    assert has_stalled(epoch, best_epoch, patience) is stalled


def test_a_run_that_gets_better_in_time_goes_on() -> None:
    scores, best, best_epoch, ended = [0.5, 0.6, 0.55, 0.58, 0.7, 0.6, 0.6, 0.6], None, 0, 0
    for epoch, score in enumerate(scores, 1):
        if best is None or score > best:
            best, best_epoch = score, epoch
        ended = epoch
        if has_stalled(epoch, best_epoch, 3):
            break
    assert (ended, best_epoch) == (8, 5)
