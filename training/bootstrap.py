"""How sure a metric is: intervals from resampling sources, not clips, for the clips of one source are alike.

labels, probabilities -> metrics under weights (R, N) -> 95 % of R resamples of the sources
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clips.mix import uniforms
from clips.words import counted

from .metrics import SMALLEST_PROBABILITY, Judged

NUM_RESAMPLES = 1000
COVERED = 0.95
FEWEST_SOURCES = 5  # of fewer, resamples are nearly always the same few
FEW_SOURCES = 10  # of fewer, too narrow: of sources with normal means, 2000 times, 84 % were covered over 5, 89 % over 10, 94 % over 30
MOST_UNDEFINED = 0.1  # of the resamples; where more lack a class, the others tell of another population
CHUNK = 1 << 21  # weights at once: 16 MB each array of them


@dataclass(frozen=True)
class Intervals:
    """Lower and upper end by metric, None where there is none; `notes` say on how many sources they rest, and why some are missing."""

    ends: Mapping[str, tuple[float, float] | None]
    notes: Sequence[str]


def intervals(judged: Judged, threshold: float | None = None, seed: int = 0) -> Intervals:
    """The 95 % percentile interval of each metric over resamples of the clips' sources."""
    return intervals_of(lambda weights: weighted_metrics(judged, weights, threshold), judged.sources, seed)


def intervals_of(measure: Callable[[np.ndarray], Mapping[str, np.ndarray]], sources: Sequence[str], seed: int = 0) -> Intervals:
    """The interval of each value that `measure` gives by name, float64 (R,) of clip weights (R, N), NaN where undefined."""
    num_sources = len(set(sources))
    if num_sources < FEWEST_SOURCES:
        return Intervals({}, [f"no intervals: {counted(num_sources, 'source')}, expected at least {FEWEST_SOURCES}"])
    parts = [measure(weights) for weights in resampled(sources, seed)]
    ends: dict[str, tuple[float, float] | None] = {}
    undefined: dict[str, int] = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        known = values[np.isfinite(values)]
        if 0 < len(known) < len(values):
            undefined[name] = len(values) - len(known)
        if len(values) - len(known) > MOST_UNDEFINED * len(values):
            ends[name] = None
            continue
        low, high = np.quantile(known, [(1 - COVERED) / 2, (1 + COVERED) / 2])
        ends[name] = (float(low), float(high))
    return Intervals(ends, _notes(num_sources, ends, undefined))


def _notes(num_sources: int, ends: Mapping[str, tuple[float, float] | None], undefined: Mapping[str, int]) -> list[str]:
    """A few words each; `undefined` counts by metric the resamples without a class that it needs."""
    warning = ", too few: they are too narrow" if num_sources < FEW_SOURCES else ""
    notes = [f"intervals over {num_sources} sources{warning}"] * any(end is not None for end in ends.values())
    without = [name.replace("_", " ") for name in undefined if ends[name] is None]
    partial = [name.replace("_", " ") for name in undefined if ends[name] is not None]
    notes += [f"no interval of {', '.join(without)}: undefined in over {100 * MOST_UNDEFINED:.0f} % of the resamples"] * bool(without)
    if partial:
        most = max(count for name, count in undefined.items() if ends[name] is not None)
        notes.append(f"up to {most} of {NUM_RESAMPLES} resamples left out of {', '.join(partial)}: they lack a class")
    return notes


def resampled(sources: Sequence[str], seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Iterator[np.ndarray]:
    """float64 (r, N) in chunks: how often each clip comes when as many sources as there are are drawn with replacement, each with all its clips."""
    names, source_of_clip = np.unique(np.asarray(sources, dtype=str), return_inverse=True)
    chunk = max(1, CHUNK // max(1, len(source_of_clip)))
    for start in range(0, num_resamples, chunk):
        numbers = range(start, min(start + chunk, num_resamples))
        draws = [np.floor(uniforms(len(names), "bootstrap", seed, number) * len(names)).astype(np.int64) for number in numbers]
        yield np.stack([np.bincount(draw, minlength=len(names)) for draw in draws]).astype(np.float64)[:, source_of_clip]


def weighted_metrics(judged: Judged, weights: np.ndarray, threshold: float | None = None) -> dict[str, np.ndarray]:
    """Name to float64 (R,), NaN where undefined: what `evaluate` gives for each row of weights (R, N), a clip counting as often as its weight.

    With `threshold` also the F1 of two classes at it, as `f1_at_threshold`.
    """
    truth, scores, predictions, counted = judged.labels, judged.probabilities, judged.predictions, judged.counted
    one_hot = np.eye(len(judged.class_names))
    is_right = predictions == truth
    total, right = weights.sum(axis=1), weights @ is_right
    clips, predicted, hits = weights @ one_hot[truth], weights @ one_hot[predictions], weights @ (one_hot[truth] * is_right[:, None])  # (R, K)
    losses = -np.log(np.maximum(scores[np.arange(len(truth)), truth], SMALLEST_PROBABILITY))
    ranked = [weighted_ranking(truth == index, scores[:, index], weights) for index in counted]
    found = {
        "loss": ratio(weights @ losses, total),
        "accuracy": ratio(right, total),
        "balanced_accuracy": ratio(hits, clips).mean(axis=1),
        "f1": f1_of(hits, clips, predicted)[:, counted].mean(axis=1),
        "auroc": np.mean([auroc for auroc, _ in ranked], axis=0),
        "average_precision": np.mean([precision for _, precision in ranked], axis=0),
    }
    if threshold is not None:
        is_class, is_taken = truth == counted[0], scores[:, counted[0]] >= threshold
        found["f1_at_threshold"] = f1_of(weights @ (is_class & is_taken), weights @ is_class, weights @ is_taken)
    return found


def f1_of(hits: np.ndarray, clips: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """2 TP / (clips + predicted), NaN for a class without clips."""
    return np.where(clips > 0, ratio(2 * hits, clips + predicted), np.nan)


def weighted_ranking(is_class: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision, each float64 (R,).

    The chance that a clip of the class scores above another, equal scores half, NaN without clips of both kinds; the sum of precision times the
    gain in recall over falling thresholds, NaN without clips of the class.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) < 0])  # equal scores are one step
    falling, falling_class = weights[:, order], is_class[order]
    inside = np.add.reduceat(falling * falling_class, starts, axis=1)  # (R, steps): the weight of the class's clips
    outside = np.add.reduceat(falling * ~falling_class, starts, axis=1)
    found, taken = np.cumsum(inside, axis=1), np.cumsum(outside, axis=1)
    wins = (outside * (found - inside / 2)).sum(axis=1)
    precision = ratio(found, found + taken, where_none=0.0)
    return ratio(wins, found[:, -1] * taken[:, -1]), ratio((precision * inside).sum(axis=1), found[:, -1])


def ratio(part: np.ndarray, whole: np.ndarray, where_none: float = np.nan) -> np.ndarray:
    """`part` over `whole`, `where_none` where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, where_none), where=whole > 0)
