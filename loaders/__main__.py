"""python -m loaders order: which clips each rank sees in each step of an epoch, without reading one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from clips import command
from clips.errors import InputError

from .plan import Plan
from .source import open_source


@dataclass(frozen=True)
class OrderConfig:
    """Prints the order of an epoch of training: one JSON line {"step", "rank", "keys"} for each step and rank."""

    # A word in a place of its own: tyro flattens a union of one verb, so `parse_verb` waits for the second one.
    verb: tyro.conf.Positional[Literal["order"]]
    """What to do."""
    dataset_home: Path
    """The folder of shards that pack wrote, or the unconverted folder of npz snippets: the order is the same."""
    split: str = "train"
    """train, val or test."""
    seed: int = 0
    """The training's seed."""
    epoch: int = 0
    """Counted from 0."""
    world_size: int = 1
    """The number of ranks."""
    batch_size: int = 64
    """Clips of one optimiser step over all ranks."""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise InputError(f"--epoch {self.epoch}: expected 0 or more.")
        if self.world_size < 1:
            raise InputError(f"--world-size {self.world_size}: expected at least 1.")


def order_lines(config: OrderConfig) -> Iterator[str]:
    """One JSON line a step and rank, in the order of steps; raises InputError as training would."""
    source = open_source(config.dataset_home, config.split)
    keys = [fact.key for fact in source.facts]
    source.close()
    shares = [_shares(config, len(keys), rank) for rank in range(config.world_size)]
    for step, of_ranks in enumerate(zip(*shares, strict=True)):
        for rank, numbers in enumerate(of_ranks):
            yield json.dumps({"step": step, "rank": rank, "keys": [keys[number] for number in numbers]}, ensure_ascii=False)


def _shares(config: OrderConfig, num_clips: int, rank: int) -> Iterator[list[int]]:
    """The clips' numbers of each of the rank's steps."""
    rank_batch = max(1, config.batch_size // config.world_size)
    plan = Plan(num_clips, config.batch_size, rank_batch, config.seed, rank, config.world_size)
    return (numbers.tolist() for numbers in plan.training(config.epoch))


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    config = command.parse(OrderConfig, "python -m loaders", "What a training will read, without reading it.")
    for line in order_lines(config):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
