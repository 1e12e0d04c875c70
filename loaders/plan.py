"""The order of clips: pure functions of (seed, epoch, count, labels, batch, ranks). Nothing of storage enters here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clips.errors import InputError
from clips.format import ClipFacts
from clips.mix import permutation
from clips.words import counted


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's micro-batch: its clips' numbers, and each one's place in the order of all ranks. Both int64 (n,)."""

    numbers: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Plan:
    """One split's order. `batch_size` is the clips of one optimiser step over all ranks; `micro_batch` what a rank sees at once.

    With `labels`, int (num_clips,) of 0 … K−1, training is balanced: an epoch holds as many clips of every class as the smallest one has.
    With `repeats` each clip of an epoch comes that many times in a row, in one step; position % repeats tells them apart (Hoffer et al. 2020).
    """

    num_clips: int
    batch_size: int
    micro_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1
    labels: np.ndarray | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise InputError("the split holds no clips; expected at least one.")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: expected at least 1.")
        if self.batch_size % self.world_size:
            raise InputError(f"--batch-size {self.batch_size}: expected a multiple of the {self.world_size} ranks.")
        if self.micro_batch < 1 or self.rank_batch % self.micro_batch:
            raise InputError(
                f"--micro-batch {self.micro_batch}: expected a divisor of the {self.rank_batch} clips of a rank's step "
                f"(--batch-size {self.batch_size} over {self.world_size} ranks)."
            )
        if self.repeats < 1 or self.batch_size % self.repeats:
            raise InputError(f"--repeats {self.repeats}: expected a divisor of --batch-size {self.batch_size}, which counts every repeat.")
        if self.labels is not None and self.labels.shape != (self.num_clips,):
            raise ValueError(f"labels of shape {self.labels.shape} for {self.num_clips} clips")
        if min(self._class_clips, default=1) == 0:
            raise InputError(f"--balance: no clip has label {self._class_clips.index(0)}; expected some of every class. Leave --balance out.")

    @property
    def rank_batch(self) -> int:
        """The clips of one optimiser step on one rank."""
        return self.batch_size // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches alone: every rank has the same number."""
        return self.epoch_clips // self.batch_size

    @property
    def epoch_clips(self) -> int:
        """The clips of an epoch's order, with those that its last full batch leaves out: all, or as many of each class as the smallest has; times repeats."""
        return self.repeats * self._different_clips

    @property
    def _different_clips(self) -> int:
        """The same without repeats."""
        return len(self._class_clips) * min(self._class_clips) if self._class_clips else self.num_clips

    @cached_property
    def _class_clips(self) -> tuple[int, ...]:
        """The clips of each class; empty without balance."""
        return () if self.labels is None else tuple(np.bincount(self.labels).tolist())

    def order(self, epoch: int) -> np.ndarray:
        """int64 (epoch_clips,): the epoch's order of clips; those after the last full batch are left out, others each epoch."""
        chosen = None if self.labels is None else self._balanced(epoch)
        order = permutation(self._different_clips, "order", self.seed, epoch)
        order = order if chosen is None else chosen[order]
        return order if self.repeats == 1 else np.repeat(order, self.repeats)

    def _balanced(self, epoch: int) -> np.ndarray:
        """int64 (clips of an epoch without repeats,), class by class.

        A class goes through its clips in cycles, each a shuffle of its own; a cycle is cut into as many whole stretches as it has room for, and an epoch
        takes one. So no clip comes twice in an epoch, nor again before every stretch has had its turn; what is left over differs from cycle to cycle.
        """
        taken = min(self._class_clips)
        chosen = np.empty(self._different_clips, np.int64)
        for label, count in enumerate(self._class_clips):
            cycle, stretch = divmod(epoch, count // taken)
            shuffled = permutation(count, "balance", self.seed, label, cycle)[stretch * taken : (stretch + 1) * taken]
            chosen[label * taken : (label + 1) * taken] = np.flatnonzero(self.labels == label)[shuffled]
        return chosen

    def check_epoch(self) -> None:
        """Raises InputError where an epoch has no full batch."""
        if self.steps_per_epoch == 0:
            clips = counted(self._different_clips, "clip")
            clips += " in balanced classes" * (self.labels is not None) + f", each {self.repeats} times" * (self.repeats > 1)
            most = self.epoch_clips - self.epoch_clips % math.lcm(self.world_size, self.repeats)
            smaller = f"a --batch-size of at most {most}" if most else f"fewer ranks than {self.world_size}"
            raise InputError(
                f"--batch-size {self.batch_size}: an epoch has {clips}, not enough for one step. "
                f"Give {smaller}, or more clips: a larger --fraction, another --dataset-home{', no --balance' * (self.labels is not None)}."
            )

    def training(self, epoch: int, consumed: int = 0) -> Iterator[Part]:
        """This rank's micro-batches of an epoch, from the position `consumed` (clips of finished steps) on."""
        self.check_epoch()
        if consumed % self.batch_size:
            raise ValueError(f"position {consumed} is not a whole number of steps of {self.batch_size} clips")
        order = self.order(epoch)
        for step in range(consumed // self.batch_size, self.steps_per_epoch):
            begin = step * self.batch_size + self.rank * self.rank_batch
            for offset in range(0, self.rank_batch, self.micro_batch):
                positions = np.arange(begin + offset, begin + offset + self.micro_batch)
                yield Part(order[positions], positions)

    @property
    def evaluation_rounds(self) -> int:
        """The most batches that a rank has in an evaluation."""
        return math.ceil(math.ceil(self.num_clips / self.world_size) / self.micro_batch)

    def evaluation(self) -> Iterator[Part]:
        """This rank's batches of one pass in which each clip comes exactly once over all ranks; the last may be short or absent.

        Clips come by their numbers, so these are the positions, too.
        """
        begin, end = (self.num_clips * r // self.world_size for r in (self.rank, self.rank + 1))
        for start in range(begin, end, self.micro_batch):
            numbers = np.arange(start, min(start + self.micro_batch, end))
            yield Part(numbers, numbers)


def balanced_labels(facts: Sequence[ClipFacts], class_names: Sequence[str] = ()) -> np.ndarray:
    """int64 (num_clips,): the labels that make a plan balanced; InputError naming the classes that have no clip."""
    labels = np.fromiter((fact.label for fact in facts), np.int64, len(facts))
    counts = np.bincount(labels, minlength=len(class_names))
    if missing := [name for name, count in zip(class_names, counts, strict=False) if not count]:
        raise InputError(f"--balance: no clips of {', '.join(missing)}; expected some of every class. Leave --balance out.")
    return labels
