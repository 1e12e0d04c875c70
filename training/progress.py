"""Where a training stands: what a checkpoint keeps beside weights and moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """Steps and epochs are counted from the start of the run; an epoch is trained, then evaluated."""

    step: int = 0  # optimiser steps
    trained: int = 0  # epochs whose last step is done
    evaluated: int = 0  # epochs whose metrics on val are known
    consumed: int = 0  # clips of the epoch under way, over all ranks, of finished steps
    loss_sum: float = 0.0  # of the epoch under way, over its steps so far and all ranks
    loss_steps: int = 0  # the number of losses in it
    skipped: int = 0  # steps whose loss or gradients were not finite
    best: float | None = None  # the score of the best epoch, higher is better
    best_epoch: int = 0  # counted from 1

    def state_dict(self) -> dict[str, Any]:  # Any: numbers
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:  # Any: numbers
        for field in fields(self):
            setattr(self, field.name, state[field.name])

    def end_epoch(self) -> None:
        """The last step of an epoch is done."""
        self.trained += 1
        self.consumed, self.loss_sum, self.loss_steps = 0, 0.0, 0

    def score(self, score: float | None, epoch: int) -> bool:
        """Whether this epoch is the best so far: of equal scores the earlier stays, any score beats none, and of none the last stays."""
        self.evaluated = epoch
        if self.best is None or (score is not None and score > self.best):
            self.best, self.best_epoch = score, epoch
            return True
        return False
