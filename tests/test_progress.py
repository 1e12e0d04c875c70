"""Where a run stands: which epoch is the best, whether the weights are its own, and what is said of it."""

from __future__ import annotations

import pytest

from training import checkpoint
from training.progress import Progress
from training.threshold import Threshold

METRICS = {"loss": 0.5, "auroc": 0.91234, "f1": None, "confusion": [[1, 0], [0, 1]], "unread": 0, "notes": []}


def test_the_best_epochs_metrics_and_threshold_come_back_from_a_checkpoint() -> None:
    progress = Progress(trained=2)
    assert progress.score(0.91234, 2, METRICS, Threshold(0.25, "gesture", 0.5, 2))
    assert not progress.score(0.9, 3, {"auroc": 0.9}, Threshold(0.75, "gesture", 0.5, 3))
    state = progress.state_dict()
    checkpoint.check_plain(state, "progress")
    other = Progress()
    other.load_state_dict(state)
    assert other == progress and other.best_threshold == Threshold(0.25, "gesture", 0.5, 2)
    assert other.best_metrics == {"loss": 0.5, "auroc": 0.91234}


def test_an_epoch_without_a_threshold_leaves_none_of_an_earlier_one() -> None:
    progress = Progress()
    progress.score(0.1, 1, METRICS, Threshold(0.25, "gesture", 0.5, 1))
    assert progress.score(0.2, 2) and progress.best_threshold is None and progress.best_metrics == {}


@pytest.mark.parametrize(
    ("progress", "is_at_best"),
    [
        (Progress(), False),
        (Progress(step=5, trained=1), False),  # trained, not yet evaluated
        (Progress(step=5, trained=1, evaluated=1, best_epoch=1), True),
        (Progress(step=6, trained=1, evaluated=1, best_epoch=1, consumed=4), False),  # a step after it
        (Progress(step=10, trained=2, evaluated=1, best_epoch=1), False),
        (Progress(step=10, trained=2, evaluated=2, best_epoch=1), False),
        (Progress(step=10, trained=2, evaluated=2, best_epoch=2), True),
    ],
)
def test_the_weights_are_the_best_epochs_right_after_it_alone(progress: Progress, is_at_best: bool) -> None:
    assert progress.is_at_best is is_at_best


def test_the_best_epoch_in_words() -> None:
    progress = Progress()
    progress.score(0.91234, 7, METRICS)
    assert progress.best_in_words("auroc") == "epoch 7 (val auroc 0.9123)"
    assert progress.best_in_words("balanced_accuracy") == "epoch 7 (the last: no balanced accuracy on val)"


def test_of_equal_scores_the_lower_loss_counts_then_the_earlier_epoch() -> None:
    progress = Progress()
    epochs = [(1.0, 0.69), (0.9, 0.1), (1.0, 0.7), (1.0, 0.2), (1.0, 0.2)]  # AUROC and loss
    taken = [progress.score(auroc, epoch, {"auroc": auroc, "loss": loss}) for epoch, (auroc, loss) in enumerate(epochs, 1)]
    assert taken == [True, False, False, True, False]
    assert progress.best_epoch == 4
    again = Progress()
    again.load_state_dict(progress.state_dict())
    assert not again.score(1.0, 6, {"auroc": 1.0, "loss": 0.3}) and again.score(1.0, 7, {"auroc": 1.0, "loss": 0.1})
