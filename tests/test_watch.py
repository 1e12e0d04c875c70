"""What is kept of steps between two lines of the log, over saves and ranks."""

from __future__ import annotations

import math

import torch

from training.distributed import Group
from training.watch import Watch, merged

CPU = torch.device("cpu")
ALONE = Group(0, 1, 0, CPU, "single")


def watch(*losses: float) -> Watch:
    """After steps with these losses, of clips named by the step."""
    made = Watch(CPU, counts_norms=True)
    for step, loss in enumerate(losses):
        made.add(torch.tensor(loss), torch.tensor(1.0 if math.isfinite(loss) else math.nan), (f"clip{step}",))
    return made


def test_the_mean_is_of_finite_losses_and_the_others_are_named() -> None:
    found = watch(1.0, math.nan, 3.0, math.inf).read(ALONE)
    assert (found.loss, found.num_losses, found.skipped) == (2.0, 2, [["clip1"], ["clip3"]])


def test_a_reading_begins_anew_and_nothing_finite_has_no_mean() -> None:
    made = watch(1.0)
    made.read(ALONE)
    assert (made.read(ALONE).loss, made.read(ALONE).skipped) == (None, [])


def test_an_infinite_norm_counts_unless_the_loss_scale_is_still_sought() -> None:
    for counts, norm, expected in ((True, math.inf, [["a"]]), (False, math.inf, []), (True, math.nan, [["a"]]), (False, math.nan, [["a"]])):
        made = Watch(CPU, counts)
        made.add(torch.tensor(1.0), torch.tensor(norm), ("a",))
        assert made.read(ALONE).skipped == expected


def test_small_losses_after_a_large_one_are_not_lost_in_the_sum() -> None:
    made = watch(2.0**24, *[1.0] * 100)  # in float32, 2^24 + 1 is 2^24
    state = merged([made.state_dict(), watch(2.0**24, 1.0).state_dict()])
    assert made.read(ALONE).loss_sum == 2.0**24 + 100
    continued = Watch(CPU, counts_norms=True)
    continued.load_state_dict(state)
    assert continued.read(ALONE).loss_sum == 2.0**25 + 101


def test_a_save_between_two_readings_loses_neither_losses_nor_skipped_steps() -> None:
    state = merged([watch(1.0, math.nan).state_dict(), watch(2.0, 5.0).state_dict()])
    continued = Watch(CPU, counts_norms=True)
    continued.load_state_dict(state)
    continued.add(torch.tensor(4.0), torch.tensor(1.0), ("later",))
    again = merged([continued.state_dict(), watch(0.0).state_dict()])  # saved once more before the line: what was before stays
    last = Watch(CPU, counts_norms=True)
    last.load_state_dict(again)
    found = last.read(ALONE)
    assert (found.loss_sum, found.num_losses, found.skipped) == (12.0, 5, [["clip1"]])
