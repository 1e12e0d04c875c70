"""Predictions as annotations: for each source a tab-delimited text file that ELAN imports (File > Import > CSV / Tab-delimited Text File).

Columns, without a header: tier, begin, end and duration in ms, value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clips.errors import InputError
from clips.files import write_whole
from clips.format import ClipFacts

from .metrics import Prediction

TIER = "prediction"


@dataclass(frozen=True)
class Annotation:
    """A stretch of a source, in ms, and the class that was found there."""

    begin_ms: int
    end_ms: int
    value: str


@dataclass(frozen=True)
class Decision:
    """Which class a clip is taken for: of two, the positive one (its index) from `threshold` on; of more, the most probable."""

    class_names: Sequence[str]
    positive: int | None
    threshold: float

    def __call__(self, probabilities: Sequence[float]) -> str | None:
        """The class, or None for the negative one."""
        if self.positive is None:
            return self.class_names[int(np.argmax(probabilities))]
        return self.class_names[self.positive] if probabilities[self.positive] >= self.threshold else None


def write_elan(folder: Path, rows: Iterable[Prediction], decide: Decision) -> Mapping[str, int]:
    """FOLDER/<source>.txt of each source whose clips' times are all known; the sources and their numbers of annotations.

    A source without annotations gets an empty file.
    """
    by_source: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        by_source[row.source or ""].append(row)
    written = {}
    for source, found in sorted(by_source.items()):
        if Path(source).name != source:
            raise InputError(f"source {source!r}: is no name for a file in --elan {folder}. Rename its clips.")
        if all(row.begin_ms is not None and row.end_ms is not None for row in found):
            annotations = annotations_of(found, decide)
            lines = [f"{TIER}\t{one.begin_ms}\t{one.end_ms}\t{one.end_ms - one.begin_ms}\t{one.value}\n" for one in annotations]
            write_whole(folder / f"{source}.txt", "".join(lines).encode())
            written[source] = len(annotations)
    return written


def with_times(facts: Sequence[ClipFacts], clip_ms: int) -> list[ClipFacts]:
    """The facts, and where begin and end are unknown, those of consecutive windows of `clip_ms`, if a source's running numbers have no gap."""
    numbers: dict[str, list[int | None]] = defaultdict(list)
    for fact in facts:
        numbers[fact.source].append(fact.index)
    starts = {}
    for source, found in numbers.items():
        known = sorted(number for number in found if number is not None)
        if len(known) == len(found) and known == list(range(known[0], known[0] + len(known))):
            starts[source] = known[0]
    return [_timed(fact, starts.get(fact.source), clip_ms) for fact in facts]


def _timed(fact: ClipFacts, start: int | None, clip_ms: int) -> ClipFacts:
    if fact.begin_ms is not None or fact.index is None or start is None:
        return fact
    begin_ms = (fact.index - start) * clip_ms
    return replace(fact, begin_ms=begin_ms, end_ms=begin_ms + clip_ms)


def annotations_of(rows: Iterable[Prediction], decide: Decision) -> list[Annotation]:
    """One source's annotations by begin: clips of one class that touch or overlap are one; a clip that was not read ends it."""
    found: list[Annotation] = []
    last: str | None = None
    for row in sorted(rows, key=lambda row: (row.begin_ms, row.end_ms)):
        value = None if row.probabilities is None else decide(row.probabilities)
        if value is not None:
            begin_ms, end_ms = round(row.begin_ms), round(row.end_ms)  # type: ignore[arg-type]  # likewise
            if value == last and begin_ms <= found[-1].end_ms:
                found[-1] = Annotation(found[-1].begin_ms, max(found[-1].end_ms, end_ms), value)
            else:
                found.append(Annotation(begin_ms, end_ms, value))
        last = value
    return found
