"""What a run would do, tried before it waits in a queue: a few steps of everything, or one batch learned by heart. Neither touches the run's folder."""

from __future__ import annotations

import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from clips.errors import InputError

from .distributed import Group
from .evaluation import HasVideo, scored
from .mixing import Labelled
from .precision import Precision

logger = logging.getLogger(__name__)

STEPS = 5  # of a dry run; the first brings what only first steps cost and does not count for its speed


class Shown(HasVideo, Labelled, Protocol):
    """Clips that a model can be shown and asked about."""


@dataclass(frozen=True)
class RehearsalConfig:
    """What is tried instead of a run."""

    dry_run: bool = False
    """Try all of it and write no run: open the data, build the model, take five steps and a batch of each split, save and read back, say what a run takes."""
    overfit_batch: int | None = None
    """Learn the first batch by heart in this many steps (50 is a good number) and write no run: whether loss, labels, weights and --lr fit together."""

    def __post_init__(self) -> None:
        if self.overfit_batch is not None and self.overfit_batch < 1:
            raise InputError(f"--overfit-batch {self.overfit_batch}: expected a number of steps, at least 1.")
        if self.dry_run and self.overfit_batch is not None:
            raise InputError("--dry-run and --overfit-batch: expected one of them.")

    @property
    def is_asked(self) -> bool:
        return self.dry_run or self.overfit_batch is not None


@contextmanager
def scratch_folder(folder: Path, group: Group) -> Iterator[Path]:
    """A folder on the file system of the run's `folder`, the same on all ranks, gone afterwards."""
    path = group.ask_main(lambda: _make_beside(folder))
    try:
        yield path
        group.barrier()
    finally:
        shutil.rmtree(path, ignore_errors=True)  # each rank: rank 0 may have been ended where it waited


def _make_beside(folder: Path) -> Path:
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        return Path(tempfile.mkdtemp(prefix=".dry-run-", dir=above))
    except OSError as error:
        raise InputError(f"--logger-folder {folder}: expected that {above} can be written to; found: {error.strerror}. Give a folder of yours.") from error


def timed_steps(step: Callable[[], torch.Tensor], num_steps: int) -> float:
    """Seconds of a step, the median without the first; InputError for a loss that is not finite. Waits for the device at every step."""
    seconds: list[float] = []
    for number in range(num_steps):
        start_s = time.perf_counter()
        loss = step().item()
        seconds.append(time.perf_counter() - start_s)
        logger.info(f"dry run: step {number + 1} of {num_steps}: loss {loss:.4f}, {seconds[-1]:.2f} s")
        if not torch.tensor(loss).isfinite():
            raise InputError(f"dry run: the loss of step {number + 1} is {loss}. Look at these clips (python -m convert view), or take --precision fp32.")
    return statistics.median(seconds[1:] or seconds)


def needs(step_s: float, steps_per_epoch: int, epochs: int, checkpoint: Path, best: Path, folder: Path) -> list[str]:
    """Lines: how long a run takes at this speed, and what it writes against what is free."""
    epoch_s = step_s * steps_per_epoch
    checkpoint_bytes, best_bytes = (sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in (checkpoint, best))
    free_bytes = shutil.disk_usage(checkpoint).free
    most_bytes = 3 * checkpoint_bytes + 2 * best_bytes  # the last two and the one that is being written; best and its successor
    room = f"a run writes up to {megabytes(most_bytes)} ({megabytes(checkpoint_bytes)} a checkpoint, {megabytes(best_bytes)} best/)"
    if free_bytes < most_bytes:
        raise InputError(f"--logger-folder {folder}: {room}; only {megabytes(free_bytes)} are free there. Make room, or give another folder.")
    return [
        f"dry run: {duration(epoch_s)} an epoch and {duration(epoch_s * epochs)} in all at {step_s:.2f} s a step, evaluations not counted",
        f"dry run: {room}; {megabytes(free_bytes)} are free for {folder}",
    ]


def learn_by_heart(
    step: Callable[[], torch.Tensor], count_right: Callable[[], tuple[int, int]], num_steps: int, lr: float, group: Group
) -> None:
    """Says how the loss fell and how many clips of the batch are told right; InputError where some are not."""
    losses = []
    bar = tqdm(total=num_steps, desc="one batch", unit="step", disable=None if group.is_main else True)
    for _ in range(num_steps):
        losses.append(group.sum([step().item()])[0] / group.world_size)
        bar.set_postfix(loss=losses[-1])
        bar.update()
    bar.close()
    num_right, num_clips = count_right()
    story = f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {num_steps} steps at a rate of {lr:.3g}; {num_right} of the {num_clips} clips are told right"
    if num_right < num_clips:
        raise InputError(
            f"--overfit-batch {num_steps}: {story}. Expected all. The rate is --lr x the batch size / 256: for a small batch give a higher --lr, such as 1e-2, "
            "or more steps; only if that does not help, look at these clips and their labels (python -m convert view)."
        )
    logger.info(f"one batch: {story}: loss, labels, weights and rate fit together")


def check_both(batches: Sequence[Labelled], group: Group) -> None:
    """Raises InputError where there is nothing to tell apart."""
    labels = {label for labels in group.gather_objects([batch.label.tolist() for batch in batches]) for found in labels for label in found}
    if len(labels) < 2:
        raise InputError("--overfit-batch: the first batch holds clips of one class alone, which proves nothing. Give a larger --batch-size or another --seed.")


def told_right(model: nn.Module, batches: Iterable[Shown], precision: Precision, group: Group) -> tuple[int, int]:
    """How many of these batches' clips the model tells right, and how many there are, over all ranks."""
    right = clips = 0
    for batch, found in scored(model, batches, precision):
        right += int((found.argmax(dim=-1) == batch.label).sum())
        clips += len(found)
    total = group.sum([right, clips])
    return round(total[0]), round(total[1])


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.5 h or 4.2 days."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2f} s"


def megabytes(num_bytes: float) -> str:
    """Such as 12 MB or 3.4 GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
