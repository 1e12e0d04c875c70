"""When training has seen enough."""

from __future__ import annotations


def has_stalled(epoch: int, best_epoch: int, patience: int | None) -> bool:
    """Whether `patience` epochs have ended since the best one; `epoch` and `best_epoch` count finished epochs, a patience of None never ends."""
    return patience is not None and epoch - best_epoch >= patience
