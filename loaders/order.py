"""python -m loaders order: which clips each rank sees in each step of an epoch, without reading one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clips.errors import InputError

from .folds import trained_on
from .plan import Plan, balanced_labels
from .source import open_source


@dataclass(frozen=True)
class OrderConfig:
    """Prints the order of an epoch of training: one JSON line {"step", "rank", "keys"} for each step and rank."""

    dataset_home: Path
    """The folder of shards that pack wrote, or the unconverted folder of npz snippets: the order is the same."""
    split: str = "train"
    """Whose clips. The order is training's whatever the split; in evaluation every clip comes once, by sorted key."""
    seed: int = 0
    """The training's seed."""
    epoch: int = 0
    """Counted from 0."""
    world_size: int = 1
    """The number of ranks."""
    batch_size: int = 64
    """Clips of one optimiser step over all ranks."""
    fraction: float = 1.0
    """The training's share of the clips."""
    balance: bool = False
    """As many clips of each class as the smallest has, none twice in an epoch."""
    fold: str | None = None
    """The training's I/K: the clips of fold I are held out."""
    repeats: int = 1
    """Times that a step holds each of its clips, as --repeats of train.py."""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise InputError(f"--epoch {self.epoch}: expected 0 or more.")
        for flag, number in (("--world-size", self.world_size), ("--batch-size", self.batch_size), ("--repeats", self.repeats)):
            if number < 1:
                raise InputError(f"{flag} {number}: expected at least 1.")


def order(config: OrderConfig) -> int:
    """Prints the lines; the exit code."""
    for line in order_lines(config):
        print(line)
    return 0


def order_lines(config: OrderConfig) -> Iterator[str]:
    """One JSON line a step and rank, in the order of steps; raises InputError as training would."""
    source = open_source(config.dataset_home, config.split)
    source.close()
    facts = trained_on(source, config.fraction, config.fold)
    labels = balanced_labels(facts, source.class_names) if config.balance else None
    rank_batch = max(1, config.batch_size // config.world_size)
    plan = Plan(len(facts), config.batch_size, rank_batch, config.seed, world_size=config.world_size, labels=labels, repeats=config.repeats)
    plan.check_epoch()
    for step, part in enumerate(replace(plan, micro_batch=config.batch_size, world_size=1).training(config.epoch)):
        for rank in range(config.world_size):
            keys = [facts[number].key for number in part.numbers[rank * rank_batch : (rank + 1) * rank_batch].tolist()]
            yield json.dumps({"step": step, "rank": rank, "keys": keys}, ensure_ascii=False)
