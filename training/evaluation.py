"""A model's probabilities for every clip of a split, each exactly once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from clips.format import ClipFacts

from .distributed import Group
from .metrics import Prediction
from .precision import Precision

METRICS = ("loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision")


class HasVideo(Protocol):
    """What is used of a batch: video (B, T, H, W, 3), and each clip's place in the split."""

    @property
    def video(self) -> torch.Tensor: ...

    @property
    def number(self) -> Sequence[int]: ...


@torch.no_grad()
def probabilities(model: nn.Module, batches: Iterable[HasVideo], num_clips: int, precision: Precision, group: Group) -> np.ndarray:
    """float32 (num_clips, K) on every rank, row by clip number; raises ValueError unless each clip came exactly once."""
    was_training = model.training
    model.eval()
    numbers: list[int] = []
    rows: list[torch.Tensor] = []
    for batch in batches:
        with precision.autocast():
            logits = model(batch.video)
        rows.append(torch.softmax(logits.float(), dim=-1))  # stays on the device: no wait for the GPU until the end
        numbers += batch.number
    model.train(was_training)
    mine = torch.cat(rows).cpu().numpy() if rows else None
    gathered = group.gather_objects((numbers, mine))
    order = np.concatenate([np.asarray(found, np.int64) for found, _ in gathered])
    if sorted(order.tolist()) != list(range(num_clips)):
        raise ValueError(f"{len(order)} clips were evaluated, {len(set(order.tolist()))} of them different; expected each of {num_clips} once")
    joined = np.concatenate([rows for _, rows in gathered if rows is not None])
    result = np.empty_like(joined)
    result[order] = joined
    return result


def prediction_rows(facts: Sequence[ClipFacts], split: str, scores: np.ndarray) -> list[Prediction]:
    """The rows of a predictions file; a negative label is an unknown one."""
    return [
        Prediction(fact.key, split, fact.label if fact.label >= 0 else None, row.tolist(), fact.source, fact.begin_ms, fact.end_ms)
        for fact, row in zip(facts, scores, strict=True)
    ]


def in_words(metrics: Mapping[str, Any]) -> str:  # Any: what `evaluate` gives
    """The metrics in one line, undefined ones left out and explained."""
    values = ", ".join(f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in METRICS if metrics[name] is not None)
    parts = [values] * bool(values) + [f"confusion {metrics['confusion']}"] * (metrics["confusion"] is not None)
    return " ".join([", ".join(parts)] * bool(parts) + [f"({note})" for note in metrics["notes"]])
