"""A model's probabilities for every clip of a split, each exactly once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from clips.errors import InputError
from clips.format import ClipFacts

from .distributed import Group
from .metrics import Prediction, evaluate
from .precision import Precision

METRICS = ("loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision")


class Unread(Protocol):
    """A clip that could not be read: its place in the split, and why."""

    @property
    def position(self) -> int: ...

    @property
    def reason(self) -> str: ...


class HasVideo(Protocol):
    """What is used of a batch: video (B, T, H, W, 3), each clip's place in the split, and those whose video is only zeros."""

    @property
    def video(self) -> torch.Tensor: ...

    @property
    def number(self) -> Sequence[int]: ...

    @property
    def bad(self) -> Sequence[Unread]: ...


@dataclass(frozen=True)
class Scores:
    """`probabilities` float32 (N, K), row by clip number; NaN for the `unread`, whose reasons stand by their numbers."""

    probabilities: np.ndarray
    unread: Mapping[int, str]

    @property
    def is_read(self) -> np.ndarray:
        """bool (N,)."""
        found = np.ones(len(self.probabilities), bool)
        found[list(self.unread)] = False
        return found


@torch.no_grad()
def probabilities(model: nn.Module, batches: Iterable[HasVideo], num_clips: int, precision: Precision, group: Group, max_bad_clips: int = 0) -> Scores:
    """Every clip's, on every rank; raises ValueError unless each clip came exactly once, InputError for more unread ones than allowed."""
    was_training = model.training
    model.eval()
    numbers: list[int] = []
    rows: list[torch.Tensor] = []
    unread: dict[int, str] = {}
    for batch in batches:
        with precision.autocast():
            logits = model(batch.video)
        rows.append(torch.softmax(logits.float(), dim=-1))  # stays on the device: no wait for the GPU until the end
        numbers += batch.number
        unread |= {clip.position: clip.reason for clip in batch.bad}
    model.train(was_training)
    mine = torch.cat(rows).cpu().numpy() if rows else None
    gathered = group.gather_objects((numbers, mine, unread))
    order = np.concatenate([np.asarray(found, np.int64) for found, _, _ in gathered])
    if sorted(order.tolist()) != list(range(num_clips)):
        raise ValueError(f"{len(order)} clips were evaluated, {len(set(order.tolist()))} of them different; expected each of {num_clips} once")
    joined = np.concatenate([rows for _, rows, _ in gathered if rows is not None])
    result = np.empty_like(joined)
    result[order] = joined
    all_unread = {number: reason for _, _, found in gathered for number, reason in found.items()}
    if len(all_unread) > max_bad_clips:
        reasons = list(all_unread.values())
        raise InputError(f"--max-bad-clips {max_bad_clips}: {len(reasons)} clips cannot be read. The first: {reasons[0]}")
    result[list(all_unread)] = np.nan
    return Scores(result, all_unread)


def metrics_of(facts: Sequence[ClipFacts], scores: Scores, class_names: Sequence[str], positive: str | None) -> dict[str, Any]:  # Any: as `evaluate`
    """The metrics of the clips that were read, and `unread`, the number of the others."""
    read = scores.is_read
    labels = np.asarray([fact.label for fact in facts])[read]
    metrics = evaluate(labels, scores.probabilities[read], class_names, positive)
    notes = [f"{len(scores.unread)} clips could not be read and are left out"] if scores.unread else []
    return {**metrics, "unread": len(scores.unread), "notes": [*notes, *metrics["notes"]]}  # type: ignore[misc]  # notes are a list


def prediction_rows(facts: Sequence[ClipFacts], split: str, scores: Scores) -> list[Prediction]:
    """The rows of a predictions file; a negative label is an unknown one, a clip that was not read has no probabilities."""
    return [
        Prediction(
            fact.key,
            split,
            fact.label if fact.label >= 0 else None,
            None if number in scores.unread else row.tolist(),
            fact.source,
            fact.begin_ms,
            fact.end_ms,
        )
        for number, (fact, row) in enumerate(zip(facts, scores.probabilities, strict=True))
    ]


def in_words(metrics: Mapping[str, Any]) -> str:  # Any: what `evaluate` gives
    """The metrics in one line, undefined ones left out and explained."""
    values = ", ".join(f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in METRICS if metrics[name] is not None)
    parts = [values] * bool(values) + [f"confusion {metrics['confusion']}"] * (metrics["confusion"] is not None)
    return " ".join([", ".join(parts)] * bool(parts) + [f"({note})" for note in metrics["notes"]])
