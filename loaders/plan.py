"""The order of clips: pure functions of (seed, epoch, count, batch, ranks). Nothing of storage enters here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clips.errors import InputError
from clips.mix import permutation


@dataclass(frozen=True)
class Plan:
    """One split's order. `batch_size` is the clips of one optimiser step over all ranks; `micro_batch` what a rank sees at once."""

    num_clips: int
    batch_size: int
    micro_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise InputError("the split holds no clips; expected at least one.")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise InputError(f"--batch-size {self.batch_size}: expected a multiple of the {self.world_size} ranks.")
        if self.micro_batch < 1 or self.rank_batch % self.micro_batch:
            raise InputError(
                f"--micro-batch {self.micro_batch}: expected a divisor of the {self.rank_batch} clips of a rank's step "
                f"(--batch-size {self.batch_size} over {self.world_size} ranks)."
            )

    @property
    def rank_batch(self) -> int:
        """The clips of one optimiser step on one rank."""
        return self.batch_size // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches alone: every rank has the same number."""
        return self.num_clips // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """int64 (num_clips,): the epoch's order of clips; those after the last full batch are left out, others each epoch."""
        return permutation(self.num_clips, "order", self.seed, epoch)

    def training(self, epoch: int, consumed: int = 0) -> Iterator[np.ndarray]:
        """This rank's micro-batches of an epoch, from the position `consumed` (clips of finished steps) on."""
        if self.steps_per_epoch == 0:
            raise InputError(
                f"--batch-size {self.batch_size}: larger than the split, which holds {self.num_clips} clips. "
                f"Expected at most {self.num_clips - self.num_clips % self.world_size}."
            )
        if consumed % self.batch_size:
            raise ValueError(f"position {consumed} is not a whole number of steps of {self.batch_size} clips")
        order = self.order(epoch)
        for step in range(consumed // self.batch_size, self.steps_per_epoch):
            begin = step * self.batch_size + self.rank * self.rank_batch
            for offset in range(0, self.rank_batch, self.micro_batch):
                yield order[begin + offset : begin + offset + self.micro_batch]

    def evaluation(self) -> Iterator[np.ndarray]:
        """This rank's batches of one pass in which each clip comes exactly once over all ranks; the last may be short or absent."""
        numbers = np.arange(self.num_clips)
        begin, end = (self.num_clips * r // self.world_size for r in (self.rank, self.rank + 1))
        for start in range(begin, end, self.micro_batch):
            yield numbers[start : min(start + self.micro_batch, end)]
