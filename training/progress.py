"""Where a training stands: what a checkpoint keeps beside weights and moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .metrics import METRICS
from .threshold import Threshold


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
    best_metrics: dict[str, float] = field(default_factory=dict)  # its metrics on val, those that are defined
    best_threshold: Threshold | None = None

    def state_dict(self) -> dict[str, Any]:  # Any: plain values
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:  # Any: plain values
        for one in fields(self):
            setattr(self, one.name, state[one.name])
        stored = state["best_threshold"]
        self.best_threshold = None if stored is None else Threshold(**stored)

    @property
    def is_at_best(self) -> bool:
        """Whether the weights are those of the best epoch: it is the last that was trained and evaluated, and no step came after it."""
        return self.best_epoch > 0 and self.best_epoch == self.evaluated == self.trained and not self.consumed

    def end_epoch(self) -> None:
        """The last step of an epoch is done."""
        self.trained += 1
        self.consumed, self.loss_sum, self.loss_steps = 0, 0.0, 0

    def score(
        self, score: float | None, epoch: int, metrics: Mapping[str, Any] | None = None, threshold: Threshold | None = None
    ) -> bool:  # Any: as `evaluate`
        """Whether this epoch is the best so far: any score beats none, and of none the last stays.

        Of equal scores the lower loss on val counts, then the earlier epoch. An AUROC of 1 comes while all probabilities are still near 1/2:
        the earliest such epoch had an accuracy of .5 on test where the last had 1.
        """
        self.evaluated = epoch
        if self._is_beaten_by(score, (metrics or {}).get("loss")):
            self.best, self.best_epoch, self.best_threshold = score, epoch, threshold
            self.best_metrics = {name: value for name in METRICS if (value := (metrics or {}).get(name)) is not None}
            return True
        return False

    def _is_beaten_by(self, score: float | None, loss: float | None) -> bool:
        if self.best is None or score is None:
            return self.best is None
        return score > self.best or (score == self.best and loss is not None and loss < self.best_metrics.get("loss", math.inf))

    def best_in_words(self, metric: str) -> str:
        """Such as "epoch 7 (val auroc 0.9123)"."""
        value = self.best_metrics.get(metric)
        why = f"val {metric.replace('_', ' ')} {value:.4f}" if value is not None else f"the last: no {metric.replace('_', ' ')} on val"
        return f"epoch {self.best_epoch} ({why})"
