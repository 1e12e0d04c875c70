"""What a run writes, from its number of parameters: all are float32."""

from __future__ import annotations

FLOAT32_BYTES = 4
CHECKPOINTS = 3  # the last two and the one that is being written
BESTS = 2  # best/ and its successor


def checkpoint_bytes(parameters: int, trained: int, has_average: bool = False) -> int:
    """Weights, AdamW's two moments of those that are trained, and their average where there is one (--ema)."""
    return FLOAT32_BYTES * (parameters + (3 if has_average else 2) * trained)


def best_bytes(parameters: int) -> int:
    return FLOAT32_BYTES * parameters


def most_bytes(checkpoint: int, best: int) -> int:
    """What a run's folder holds at its fullest, from the bytes of a checkpoint and of best/."""
    return CHECKPOINTS * checkpoint + BESTS * best
