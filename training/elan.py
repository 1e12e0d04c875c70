"""Predictions as annotations: for each source a tab-delimited text file that ELAN imports (File > Import > CSV / Tab-delimited Text File).

Columns, without a header: tier, begin, end and duration in ms, value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clips import snippets
from clips.errors import InputError
from clips.files import write_whole
from clips.format import ClipFacts
from clips.manifest import is_packed, read_index, read_manifest

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


@dataclass(frozen=True)
class Windows:
    """The running numbers of each source's snippets by split, None for a name without one, and a snippet's length where the home's name tells it."""

    numbers: Mapping[str, Mapping[str, Sequence[int | None]]]
    length_ms: int | None

    def in_several_splits(self, source: str) -> bool:
        return len(self.numbers.get(source, ())) > 1

    def starts(self) -> dict[str, int]:
        """The first number of each source whose numbers, over all splits together, have no gap and do not repeat."""
        found = {}
        for source, splits in self.numbers.items():
            every = [number for numbers in splits.values() for number in numbers]
            known = sorted(number for number in every if number is not None)
            if len(known) == len(every) and known == list(range(known[0], known[0] + len(known))):
                found[source] = known[0]
        return found


def windows_of(facts: Sequence[ClipFacts]) -> Windows:
    """Of clips that belong to no split, or to one."""
    return Windows(_by_source(("", fact.source, fact.index) for fact in facts), None)


def windows_in(home: Path) -> Windows:
    """Of all splits of shards, bad snippets that were left out among them, or of npz snippets."""
    if not is_packed(home):
        found = snippets.find(home)
        numbers = _by_source((snippet.split, snippet.source, snippet.index) for split in found.splits.values() for snippet in split)
        return Windows(numbers, _length_ms(found.settings or {}))
    manifest = read_manifest(home)
    indexes = [(split, read_index(home, split, shard)) for split, entry in manifest.splits.items() for shard in entry.shards]
    there = [(split, clip.facts.source, clip.facts.index) for split, index in indexes for clip in index.clips]
    bad = [(one["path"], 0) for _, index in indexes for one in index.bad]
    left_out = snippets.from_listing(bad, manifest.classes, None, manifest.source_pattern)
    return Windows(_by_source([*there, *((snippet.split, snippet.source, snippet.index) for snippet in left_out)]), _length_ms(manifest.home))


def _length_ms(settings: Mapping[str, str | int | float]) -> int | None:
    return int(settings["length_ms"]) if "length_ms" in settings else None


def with_times(facts: Sequence[ClipFacts], windows: Windows, clip_ms: int | None) -> list[ClipFacts]:
    """The facts with begin and end as far as running numbers tell them: windows of `clip_ms`, or as the home says, one after another.

    Known times stay, but for a source in several splits: they count from its first snippet in one split, and are counted anew from
    its first in any. Where that cannot be told, because numbers are missing or repeat, they are unknown.
    """
    starts = windows.starts()
    return [_timed(fact, starts.get(fact.source), windows, clip_ms) for fact in facts]


def _timed(fact: ClipFacts, start: int | None, windows: Windows, clip_ms: int | None) -> ClipFacts:
    length_ms = clip_ms or windows.length_ms
    if fact.begin_ms is not None and fact.end_ms is not None:
        if not windows.in_several_splits(fact.source):
            return fact
        length_ms = fact.end_ms - fact.begin_ms
    if start is None or fact.index is None or length_ms is None:
        return replace(fact, begin_ms=None, end_ms=None)
    begin_ms = (fact.index - start) * length_ms
    return replace(fact, begin_ms=begin_ms, end_ms=begin_ms + length_ms)


def _by_source(windows: Iterable[tuple[str, str, int | None]]) -> dict[str, dict[str, list[int | None]]]:
    found: dict[str, dict[str, list[int | None]]] = {}
    for split, source, number in windows:
        found.setdefault(source, {}).setdefault(split, []).append(number)
    return found


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
