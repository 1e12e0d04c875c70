"""The closed form against torch's schedulers and against rates worked out by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clips.command import parse
from clips.errors import InputError
from training.schedule import ScheduleConfig, explain, lr_at

PLAIN = ScheduleConfig(warmup=0)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 1.25e-4), (34, 1.25e-4), (35, 2.5e-5), (79, 2.5e-5), (80, 5e-6), (99, 5e-6)],  # 5e-4 x 64 / 256, then twice a fifth
)
def test_the_default_rate_falls_at_epochs_35_and_80(epoch: int, rate: float) -> None:
    for step_in_epoch in (0, 6):
        assert lr_at(epoch * 7 + step_in_epoch, 7, 100, 64, PLAIN) == pytest.approx(rate, rel=1e-12)


def test_the_rate_equals_torchs_multistep_over_100_epochs() -> None:
    steps_per_epoch = 3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35 * steps_per_epoch, 80 * steps_per_epoch], gamma=0.2)
    for step in range(100 * steps_per_epoch):
        assert lr_at(step, steps_per_epoch, 100, 256, PLAIN) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_rate_equals_torchs_cosine() -> None:
    config = ScheduleConfig(sched="cosine", warmup=0, min_lr=1e-5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-5)
    for step in range(41):
        assert lr_at(step, 4, 10, 256, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_the_rate_is_scaled_by_the_global_batch() -> None:
    assert lr_at(0, 10, 100, 512, PLAIN) == pytest.approx(1e-3)
    assert lr_at(0, 10, 100, 256, PLAIN) == pytest.approx(5e-4)
    assert lr_at(0, 10, 100, 1, PLAIN) == pytest.approx(5e-4 / 256)


def test_warm_up_is_a_straight_line_to_the_peak() -> None:
    config = ScheduleConfig(warmup=0.1)
    rates = [lr_at(step, 10, 10, 256, config) for step in range(12)]
    assert rates == pytest.approx([5e-5 * (step + 1) for step in range(10)] + [5e-4, 5e-4])


def test_warm_up_takes_at_most_five_epochs() -> None:
    config = ScheduleConfig(warmup=0.5)
    assert lr_at(48, 10, 100, 256, config) == pytest.approx(5e-4 * 49 / 50)
    assert lr_at(49, 10, 100, 256, config) == lr_at(50, 10, 100, 256, config) == 5e-4


def test_cosine_starts_after_the_warm_up_and_ends_low() -> None:
    config = ScheduleConfig(sched="cosine", min_lr=0)
    rates = [lr_at(step, 10, 100, 256, config) for step in range(1000)]
    assert max(rates) == rates[49] == rates[50] == 5e-4
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert 0 < rates[-1] < 1e-8


@settings(deadline=None)
@given(
    steps_per_epoch=st.integers(1, 50),
    epochs=st.integers(1, 120),
    sched=st.sampled_from(["multistep", "cosine"]),
    warmup=st.floats(0, 0.99),
    place=st.floats(0, 1),
)
def test_the_rate_is_above_zero_and_never_above_the_peak(steps_per_epoch: int, epochs: int, sched: str, warmup: float, place: float) -> None:
    config = ScheduleConfig(sched=sched, warmup=warmup)  # type: ignore[arg-type]  # sampled from the two literals
    step = round(place * (steps_per_epoch * epochs - 1))
    assert 0 < lr_at(step, steps_per_epoch, epochs, 256, config) <= 5e-4 * (1 + 1e-12)


def test_a_long_run_is_explained_in_one_line() -> None:
    assert explain(100, 1000, 64, ScheduleConfig()) == [
        "learning rate: peak 0.000125 (0.0005 x 64 / 256), 5000 of 100000 steps warm-up, then x 0.2 at epoch 35 and 80"
    ]


@pytest.mark.parametrize(("epochs", "num_lines"), [(34, 2), (35, 2), (36, 1)])
def test_a_run_that_ends_before_the_first_milestone_says_that_the_rate_stays_constant(epochs: int, num_lines: int) -> None:
    lines = explain(epochs, 10, 64, ScheduleConfig())
    assert len(lines) == num_lines
    assert ("stays constant" in lines[-1]) == (num_lines == 2)


def test_no_milestones_and_cosine_are_explained_too() -> None:
    assert "--lr-milestones is empty" in explain(100, 10, 64, ScheduleConfig(lr_milestones=()))[1]
    (line,) = explain(10, 10, 256, ScheduleConfig(sched="cosine"))
    assert "cosine down to 1e-06" in line


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--lr", {"lr": 0.0}),
        ("--lr", {"lr": float("nan")}),
        ("--sched", {"sched": "step"}),
        ("--lr-milestones", {"lr_milestones": (80, 35)}),
        ("--lr-milestones", {"lr_milestones": (35, 35)}),
        ("--lr-milestones", {"lr_milestones": (0,)}),
        ("--lr-gamma", {"lr_gamma": 0.0}),
        ("--warmup", {"warmup": 1.0}),
        ("--min-lr", {"min_lr": 1.0}),
    ],
)
def test_a_wrong_value_names_its_flag(flag: str, changes: dict) -> None:
    with pytest.raises(InputError, match=rf"^{flag} "):
        ScheduleConfig(**changes)


def test_the_command_line_fills_the_configuration() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = parse(ScheduleConfig, "train.py", "", ["--lr-milestones", "10", "20", "--sched", "cosine", "--lr", "1e-3"])
    assert config == ScheduleConfig(lr=1e-3, sched="cosine", lr_milestones=(10, 20))
