"""A model's probabilities for every clip of a split, each exactly once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from clips.errors import InputError
from clips.format import ClipFacts
from clips.registry import check_name
from clips.words import counted

from .distributed import Group
from .metrics import METRICS, Judged, Prediction, evaluate
from .precision import Precision


@dataclass(frozen=True)
class EvaluationConfig:
    """What counts as good."""

    best_metric: Literal["loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision"] = "auroc"
    """The metric on val that chooses the best epoch; of equals the one with the lower loss on val, then the earlier."""
    positive: str | None = None
    """The positive class of F1, AUROC and average precision with two classes; default: the last, gesture."""
    evaluate_test: bool = True
    """Judge the best epoch on test at the end. A sweep does not: its runs are chosen on val, and python predict.py RUN judges the chosen one."""
    views: str = "1x1"
    """Views of a clip whose probabilities are averaged on test: choices of frames times crops of each, such as 2x3, at as many times the cost."""

    def check(self, class_names: Sequence[str]) -> None:
        """Raises InputError for a positive class that is none, or where every class counts."""
        if self.positive is not None:
            check_name(class_names, self.positive, "--positive")
            if len(class_names) > 2:
                raise InputError(f"--positive {self.positive}: with {len(class_names)} classes every class counts. Leave it out.")


class Unread(Protocol):
    """A clip that could not be read: its place in the split, and why."""

    @property
    def position(self) -> int: ...

    @property
    def reason(self) -> str: ...


class HasVideo(Protocol):
    """What is used of a batch: video (B, T, H, W, 3), its joints' masks or None, each clip's place in the split, and those whose video is only zeros."""

    @property
    def video(self) -> torch.Tensor: ...

    @property
    def keypoints(self) -> torch.Tensor | None: ...

    @property
    def number(self) -> Sequence[int]: ...

    @property
    def bad(self) -> Sequence[Unread]: ...


Video = TypeVar("Video", bound=HasVideo)


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


def probabilities(
    model: nn.Module, batches: Iterable[HasVideo], num_clips: int, precision: Precision, group: Group, max_bad_clips: int = 0, num_views: int = 1
) -> Scores:
    """Every clip's mean over its views, on every rank.

    Raises ValueError unless each clip came exactly once in each view, InputError for more unread ones than allowed.
    """
    numbers: list[int] = []
    rows: list[torch.Tensor] = []
    unread: dict[int, str] = {}
    for batch, found in scored(model, batches, precision):
        rows.append(found)  # stays on the device: no wait for the GPU until the end
        numbers += batch.number
        unread |= {clip.position: clip.reason for clip in batch.bad}
    mine = torch.cat(rows).cpu().numpy() if rows else None
    gathered = group.gather_objects((numbers, mine, unread))
    order = np.concatenate([np.asarray(found, np.int64) for found, _, _ in gathered])
    if sorted(order.tolist()) != sorted([*range(num_clips)] * num_views):
        times = "once" if num_views == 1 else f"{num_views} times"
        raise ValueError(f"{len(order)} clips were evaluated, {len(set(order.tolist()))} of them different; expected each of {num_clips} {times}")
    joined = np.concatenate([rows for _, rows, _ in gathered if rows is not None])
    total = np.zeros((num_clips, joined.shape[1]))
    np.add.at(total, order, joined)  # in fp64: of one view exactly its own fp32 numbers
    result = (total / num_views).astype(np.float32)
    all_unread = {number: reason for _, _, found in gathered for number, reason in found.items()}
    check_budget(list(all_unread.values()), max_bad_clips)
    result[list(all_unread)] = np.nan
    return Scores(result, all_unread)


@torch.no_grad()
def scored(model: nn.Module, batches: Iterable[Video], precision: Precision) -> Generator[tuple[Video, torch.Tensor], None, None]:
    """Each batch and its clips' probabilities float32 (B, K), still on the device; the model comes back in its mode."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            # `forward`, which is never compiled: best/ is judged so too, and a last batch of another size would cost a compilation
            with precision.autocast():
                logits = model.forward(batch.video) if batch.keypoints is None else model.forward(batch.video, batch.keypoints)
            yield batch, torch.softmax(logits.float(), dim=-1)
    finally:
        model.train(was_training)


def check_budget(reasons: Sequence[str], max_bad_clips: int) -> None:
    """Raises InputError for more clips that could not be read than allowed."""
    if len(reasons) > max_bad_clips:
        raise InputError(f"--max-bad-clips {max_bad_clips}: {len(reasons)} clips cannot be read. The first: {reasons[0]}")


def judged_of(facts: Sequence[ClipFacts], scores: Scores, class_names: Sequence[str], positive: str | None) -> Judged:
    """The clips that were read."""
    read = [fact for number, fact in enumerate(facts) if number not in scores.unread]
    labels = np.asarray([fact.label for fact in read], np.int64)
    return Judged(labels, scores.probabilities[scores.is_read].astype(np.float64), [fact.source for fact in read], class_names, positive)


def metrics_of(facts: Sequence[ClipFacts], scores: Scores, class_names: Sequence[str], positive: str | None) -> dict[str, Any]:  # Any: as `evaluate`
    """The metrics of the clips that were read, and `unread`, the number of the others."""
    judged = judged_of(facts, scores, class_names, positive)
    metrics = evaluate(judged.labels, judged.probabilities, class_names, positive)
    num_unread = len(scores.unread)
    if num_unread and not len(judged.labels):
        return {**metrics, "unread": num_unread, "notes": [f"none of its {counted(num_unread, 'clip')} could be read."]}
    notes = [f"{counted(num_unread, 'clip')} could not be read and {'is' if num_unread == 1 else 'are'} left out."] if num_unread else []
    return {**metrics, "unread": num_unread, "notes": [*notes, *metrics["notes"]]}  # type: ignore[misc]  # notes are a list


def why_unusable(metrics: Mapping[str, Any], scores: Scores) -> str | None:  # Any: what `metrics_of` gives
    """Why a split says nothing of the model, and what to do; None where it does say something."""
    if metrics["loss"] is not None:
        return None
    if scores.is_read.any():
        advice = "Take a lower --lr; best/ holds the best epoch before, if there was one."
    else:
        advice = "Look after its files (python -m convert verify), or move the split away to train without it."
    return " ".join([*metrics["notes"], advice])


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


def in_words(metrics: Mapping[str, Any]) -> str:  # Any: what `evaluate` or `detailed` gives
    """The metrics in one line, with their intervals where there are some; undefined ones left out and explained."""
    intervals = metrics.get("intervals", {})
    known = [f"{name.replace('_', ' ')} {metrics[name]:.4f}{_spelled(intervals.get(name))}" for name in METRICS if metrics[name] is not None]
    if metrics.get("f1_at_threshold") is not None:
        known.append(f"f1 {metrics['f1_at_threshold']:.4f}{_spelled(intervals.get('f1_at_threshold'))} at val's threshold {metrics['threshold']:.4f}")
    parts = [", ".join(known)] * bool(known) + [_table(metrics["confusion"])] * (metrics["confusion"] is not None)
    return " ".join([", ".join(parts)] * bool(parts) + [f"({note})" for note in metrics["notes"]])


def _table(confusion: Sequence[Sequence[int]] | None) -> str:
    return f"confusion {' / '.join(' '.join(map(str, row)) for row in confusion or ())} (a row a label)"


def _spelled(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" [{ends[0]:.4f}-{ends[1]:.4f}]"
