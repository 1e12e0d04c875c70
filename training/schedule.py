"""The learning rate of every step, as a closed form: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clips.errors import InputError
from clips.words import counted

BASE_BATCH_SIZE = 256  # the batch for which --lr is stated, as in VideoMAE's recipe
MAX_WARMUP_EPOCHS = 5


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate runs over the training."""

    lr: float = 5e-4
    """Peak learning rate for a batch of 256 clips; the rate used is lr x batch size / 256, whatever the number of GPUs, repeats of a clip not counted."""
    sched: Literal["multistep", "cosine"] = "multistep"
    """multistep: times --lr-gamma at each of --lr-milestones; cosine: from the peak down to --min-lr."""
    lr_milestones: tuple[int, ...] = (35, 80)
    """Epochs at which the multistep rate falls."""
    lr_gamma: float = 0.2
    """What the multistep rate is multiplied with at each milestone."""
    warmup: float = 0.05
    """Share of the steps over which the rate first rises in a straight line, at most 5 epochs; 0 is none."""
    min_lr: float = 1e-6
    """Rate at which the cosine ends, for a batch of 256 clips as --lr is."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"--lr {self.lr}: expected a rate above 0, such as 5e-4.")
        if self.sched not in ("multistep", "cosine"):
            raise InputError(f"--sched {self.sched}: expected multistep or cosine.")
        if any(epoch < 1 for epoch in self.lr_milestones) or list(self.lr_milestones) != sorted(set(self.lr_milestones)):
            raise InputError(f"--lr-milestones {' '.join(map(str, self.lr_milestones))}: expected epochs from 1 on, each later than the one before.")
        if not 0 < self.lr_gamma <= 1:
            raise InputError(f"--lr-gamma {self.lr_gamma}: expected a factor above 0 and at most 1.")
        if not 0 <= self.warmup < 1:
            raise InputError(f"--warmup {self.warmup}: expected a share of the steps from 0 to below 1.")
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"--min-lr {self.min_lr}: expected a rate from 0 to --lr {self.lr}.")


def lr_at(step: int, steps_per_epoch: int, epochs: int, batch_size: int, config: ScheduleConfig) -> float:
    """The learning rate of optimiser step `step` (from 0); `batch_size` is the different clips of one step over all ranks."""
    scale = batch_size / BASE_BATCH_SIZE
    peak = config.lr * scale
    warmup = warmup_steps(steps_per_epoch, epochs, config)
    if config.sched == "cosine":
        progress = min(1.0, max(0, step - warmup) / max(1, steps_per_epoch * epochs - warmup))
        low = config.min_lr * scale
        rate = low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        rate = peak * config.lr_gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.lr_milestones)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


def warmup_steps(steps_per_epoch: int, epochs: int, config: ScheduleConfig) -> int:
    """How many steps the rate rises: the last of them has the peak rate."""
    return round(min(config.warmup * epochs, MAX_WARMUP_EPOCHS) * steps_per_epoch)


def explain(epochs: int, steps_per_epoch: int, batch_size: int, config: ScheduleConfig) -> list[str]:
    """What the rate will do, in one line, and a second one when it never falls."""
    peak = config.lr * batch_size / BASE_BATCH_SIZE
    warmup = warmup_steps(steps_per_epoch, epochs, config)
    total = f"{warmup} of {epochs * steps_per_epoch} steps warm-up"
    line = f"learning rate: peak {peak:.4g} ({config.lr:g} x {batch_size} / {BASE_BATCH_SIZE}), {total}, "
    if config.sched == "cosine":
        return [line + f"then cosine down to {config.min_lr * batch_size / BASE_BATCH_SIZE:.4g}"]
    reached = [str(epoch) for epoch in config.lr_milestones if epoch < epochs]
    if reached:
        return [line + f"then x {config.lr_gamma:g} at epoch {' and '.join(reached)}"]
    milestone = f"before the first of --lr-milestones ({config.lr_milestones[0]})" if config.lr_milestones else "and --lr-milestones is empty"
    return [line + "then constant", f"learning rate: the run ends after {counted(epochs, 'epoch')}, {milestone}: after the warm-up the rate stays constant"]
