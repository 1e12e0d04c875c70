"""Whether two predictions of the same clips agree: python -m training agree A.csv B.csv.

rows of the clips that both have -> flips, |Δp|, McNemar's test -> ΔAUROC and ΔF1 with intervals over sources
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import tyro

from clips.errors import InputError
from clips.files import write_json
from clips.registry import check_name
from clips.snippets import SOURCE_PATTERN

from .bootstrap import intervals_of, weighted_metrics
from .foreign import Row, class_names_of, matched, read_any
from .metrics import Judged

DELTAS = ("auroc", "f1")


@dataclass(frozen=True)
class AgreeConfig:
    """Compares predictions of the same clips: one checkpoint on npz and on shards of several qualities, or two models, or another script's."""

    first: tyro.conf.Positional[Path]
    """A predictions file of ours, or any CSV file with a key and probabilities."""
    others: tyro.conf.Positional[tuple[Path, ...]]
    """One or more such files, each compared with the first; differences are theirs minus the first's."""
    class_order: tuple[str, ...] = ()
    """Class names in the order of a file's numbers 0, 1, …; a single column of probabilities is of the last. Default: the order of our file's columns."""
    positive: str | None = None
    """The positive class of two; default: the last."""
    json: Path | None = None
    """A file for the same as JSON."""

    def __post_init__(self) -> None:
        if not self.others:
            raise InputError("agree: one file given; expected at least two.")
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            raise InputError(f"--json {self.json}: expected a file in a folder that exists.")


@dataclass(frozen=True)
class Agreement:
    """Two predictions of `clips` clips. `flips` have another most probable class, `mean_change` and `largest_change` are of half the sum of |Δp| over classes

    (of two classes that is |Δp|). Of the `judged` clips with a label: how many only one of the two has right, McNemar's exact p; AUROC and F1 of
    each, their difference (second minus first) and its 95 % interval over sources.
    """

    first: str
    second: str
    clips: int
    only_first: int
    only_second: int
    unread: int
    flips: int
    mean_change: float
    largest_change: float
    judged: int
    only_first_right: int
    only_second_right: int
    mcnemar_p: float
    values: Mapping[str, tuple[float | None, float | None]]
    deltas: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float] | None]
    notes: Sequence[str]


def agree(config: AgreeConfig) -> int:
    """0 when all are compared and told."""
    paths = (config.first, *config.others)
    class_names = _class_names(paths, config.class_order)
    if config.positive is not None:
        check_name(class_names, config.positive, "--positive")
    first = read_any(config.first, class_names, config.class_order)
    found = []
    for path in config.others:
        found.append(agreement((config.first, first), (path, read_any(path, class_names, config.class_order)), class_names, config.positive))
        print(in_words(found[-1]))
    if config.json is not None:
        write_json(config.json, [asdict(one) for one in found])
    return 0


def _class_names(paths: Sequence[Path], class_order: Sequence[str]) -> tuple[str, ...]:
    """In label order: those that the files name, otherwise --class-order."""
    if names := class_names_of(paths):
        if class_order and sorted(class_order) != sorted(names):
            raise InputError(f"--class-order {' '.join(class_order)}: expected {', '.join(names)}, which the files name, in any order.")
        return names
    if len(set(class_order)) != len(class_order) or len(class_order) < 2:
        raise InputError(f"{paths[0]}: no file names its classes in columns p_<class>. Say with --class-order which classes the numbers 0, 1, … mean.")
    return tuple(class_order)


def agreement(first: tuple[Path, Sequence[Row]], second: tuple[Path, Sequence[Row]], class_names: Sequence[str], positive: str | None) -> Agreement:
    """Raises InputError where the files have no clip in common or label one differently."""
    pairs = _pairs(first, second, class_names)
    read = [(one, other) for one, other in pairs if one.probabilities is not None and other.probabilities is not None]
    if not read:
        raise InputError(f"{first[0]} and {second[0]}: no clip that both name and have probabilities for. Give predictions of the same split.")
    scores = np.asarray([[one.probabilities, other.probabilities] for one, other in read], np.float32).astype(np.float64)  # (N, 2, K)
    change = np.abs(scores[:, 0] - scores[:, 1]).sum(axis=1) / 2
    predictions = scores.argmax(axis=2)  # of equals the earlier
    known = [place for place, (one, other) in enumerate(read) if _label(one, other) is not None]
    labels = np.asarray([_label(*read[place]) for place in known], np.int64)
    sources, notes = _sources([read[place] for place in known])
    right = predictions[known] == labels[:, None]
    only_first, only_second = int((right[:, 0] & ~right[:, 1]).sum()), int((right[:, 1] & ~right[:, 0]).sum())
    both = [Judged(labels, scores[known, side], sources, class_names, positive) for side in (0, 1)]
    values, deltas, ends, more = _deltas(both)
    if len(known) < len(read):
        notes = [*notes, f"{len(read) - len(known)} clips have no label and are not judged."]
    return Agreement(
        first=str(first[0]),
        second=str(second[0]),
        clips=len(read),
        only_first=len(first[1]) - len(pairs),
        only_second=len(second[1]) - len(pairs),
        unread=len(pairs) - len(read),
        flips=int((predictions[:, 0] != predictions[:, 1]).sum()),
        mean_change=float(change.mean()),
        largest_change=float(change.max()),
        judged=len(known),
        only_first_right=only_first,
        only_second_right=only_second,
        mcnemar_p=mcnemar(only_first, only_second),
        values=values,
        deltas=deltas,
        intervals=ends,
        notes=[*notes, *more],
    )


def _pairs(first: tuple[Path, Sequence[Row]], second: tuple[Path, Sequence[Row]], class_names: Sequence[str]) -> list[tuple[Row, Row]]:
    pairs = [(first[1][a], second[1][b]) for a, b in matched([row.key for row in first[1]], [row.key for row in second[1]])]
    differing = [one for one, other in pairs if None not in (one.label, other.label) and one.label != other.label]
    if differing:
        raise InputError(
            f"{second[0]}: {len(differing)} of {len(pairs)} clips have another label than in {first[0]}, {differing[0].key!r} first. "
            f"If its numbers mean the classes in another order, say so: --class-order {' '.join(reversed(class_names))}"
        )
    return pairs


def _label(one: Row, other: Row) -> int | None:
    return one.label if one.label is not None else other.label


def _sources(pairs: Sequence[tuple[Row, Row]]) -> tuple[list[str], list[str]]:
    """Each clip's source, as a file says or as its name does; a note where clips stand for themselves."""
    found, alone = [], 0
    for one, other in pairs:
        name = one.key.replace("\\", "/").rpartition("/")[2].removesuffix(".npz")
        match = re.match(SOURCE_PATTERN, name)
        found.append(one.source or other.source or (match["source"] if match else one.key))
        alone += not (one.source or other.source or match)
    return found, [f"the source of {alone} clips is unknown: each counts as a source of its own, so intervals may be too narrow."] * (alone > 0)


def _deltas(
    both: Sequence[Judged],
) -> tuple[dict[str, tuple[float | None, float | None]], dict[str, float | None], dict[str, tuple[float, float] | None], list[str]]:
    """Each side's values, second minus first, and its interval, from the same resamples for both."""
    if not len(both[0].labels):
        return {}, {}, {}, []
    once = np.ones((1, len(both[0].labels)))
    sides = [{name: float(weighted_metrics(judged, once)[name][0]) for name in DELTAS} for judged in both]
    values = {name: (_or_none(sides[0][name]), _or_none(sides[1][name])) for name in DELTAS}
    deltas = {name: _or_none(sides[1][name] - sides[0][name]) for name in DELTAS}

    def differences(weights: np.ndarray) -> dict[str, np.ndarray]:
        first, second = (weighted_metrics(judged, weights) for judged in both)
        return {name: second[name] - first[name] for name in DELTAS}

    found = intervals_of(differences, both[0].sources)
    missing = [f"{name} is undefined: a class has no clips." for name in DELTAS if deltas[name] is None]
    return values, deltas, dict(found.ends), [*missing, *found.notes]


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test: the chance of so uneven a share of clips that one alone has right, were both equally good."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    ways, term = 0, 1
    for chosen in range(fewer + 1):
        ways += term
        term = term * (total - chosen) // (chosen + 1)
    return min(1.0, float(Fraction(2 * ways, 2**total)))


def in_words(found: Agreement) -> str:
    """Some lines for a person."""
    lines = [f"{found.second} against {found.first}: {found.clips} clips"]
    left_out = [(found.only_first, "only in the first"), (found.only_second, "only in the second"), (found.unread, "without probabilities")]
    if words := ", ".join(f"{count} {what}" for count, what in left_out if count):
        lines[0] += f" (left out: {words})"
    lines.append(f"  flips: {found.flips} ({found.flips / found.clips:.2%}), mean |Δp| {found.mean_change:.3g}, largest {found.largest_change:.3g}")
    if found.judged:
        lines.append(f"  right in one alone: {found.only_first_right} and {found.only_second_right}, McNemar's p {found.mcnemar_p:.3g}")
    for name, delta in found.deltas.items():
        if delta is not None:
            first, second = found.values[name]
            ends = found.intervals.get(name)
            spelled = f" [{ends[0]:+.4f} to {ends[1]:+.4f}]" if ends else ""
            lines.append(f"  Δ{name} {delta:+.4f}{spelled}: {first:.4f} -> {second:.4f}")
    return "\n".join([*lines, *(f"  ({note})" for note in found.notes)])
