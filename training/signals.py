"""Signals that ask a training to save and end: any one rank may get one, and all ranks act on it at the same step.

handler: only remembers -> at step k each rank says what it wishes -> at step k + 1 all know what all wished

The answer is a step late because nobody waits for it: the all-reduce runs on the CPU beside the step. A second signal finds the
flag set and changes nothing, so a save is never torn; while a model compiles, the flag waits.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from .distributed import Group

# SLURM's --signal, preemption and scancel, and what schedulers and torchrun send before they kill.
SAVE_AND_END = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopAsked(Exception):  # no error: the run ends well
    """All ranks agreed to save and end; the text is the reason."""


class Wishes:
    """What the ranks want at a step: to end because of a signal, and rank 0 to write a checkpoint because its time has come.

    With `with`: the handlers are this process's while the block runs. The same calls in the same order on every rank.
    """

    def __init__(self, group: Group, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._group, self._every_s, self._clock = group, every_s, clock
        self._saved_s = clock()
        self._signal = 0
        self._before: dict[int, object] = {}
        self._asked: tuple[torch.Tensor, dist.Work | None] | None = None  # what was said at the step before

    def __enter__(self) -> Wishes:
        for number in SAVE_AND_END:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def poll(self) -> bool:
        """Whether to write a checkpoint now; raises StopAsked when a rank was asked to end. Both as the ranks wished one call earlier."""
        answer = self._answer()
        is_due = self._group.is_main and self._clock() - self._saved_s >= self._every_s
        wish = torch.tensor([self._signal, int(is_due)])
        work = dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group.objects, async_op=True) if self._group.world_size > 1 else None
        self._asked = (wish, work)
        number, due = answer
        if number:
            self._answer()  # nothing may be under way when the ranks go on to save
            raise StopAsked(f"{signal.Signals(number).name}: asked to end")
        return bool(due)

    def saved(self) -> None:
        """A checkpoint was written: the next is due `every_s` from now."""
        self._answer()
        self._saved_s = self._clock()

    def _answer(self) -> tuple[int, int]:
        if self._asked is None:
            return 0, 0
        wish, work = self._asked
        self._asked = None
        if work is not None:
            work.wait()
        number, due = wish.tolist()
        return number, due
