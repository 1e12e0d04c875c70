"""Cross-validation over sources: a fold of the training clips stands in for val, and no source is on both sides.

facts -> each source's fold -> a part of the split that is read as a split of its own
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clips.clip import ClipSpec
from clips.errors import InputError
from clips.format import ClipFacts

from .source import ChooseFrames, ClipSource, Fetched, fraction

if TYPE_CHECKING:  # a process beside the training imports this file, and no torch
    import torch

    from .finish import Graph


@dataclass(frozen=True)
class Fold:
    """The `number`th of `count` folds, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_fold(text: str) -> Fold:
    """`2/5` as the second of five."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or not int(match[1]) <= int(match[2]) or int(match[2]) < 2:
        raise InputError(f"--fold {text}: expected I/K, the fold that is held out and how many there are, such as 1/5 to 5/5.")
    return Fold(int(match[1]), int(match[2]))


def folds_of(facts: Sequence[ClipFacts], num_classes: int, num_folds: int) -> dict[str, int]:
    """The fold, from 1, of each source.

    Sources are dealt class by class, the rarest class first; of a class's sources that are not dealt yet the largest comes first, to the fold with
    the fewest clips of that class, of equals the one with the fewest clips. So it hangs on names and labels alone.
    """
    clips: dict[str, Counter[int]] = defaultdict(Counter)
    for fact in facts:
        clips[fact.source][fact.label] += 1
    totals = Counter(fact.label for fact in facts)
    held = [Counter[int]() for _ in range(num_folds)]
    dealt: dict[str, int] = {}
    for label in sorted(range(num_classes), key=lambda label: (totals[label], label)):
        waiting = [source for source in clips if clips[source][label] and source not in dealt]
        for source in sorted(waiting, key=lambda source: (-clips[source][label], source)):
            lightest = min(range(num_folds), key=lambda fold: (held[fold][label], held[fold].total(), fold))
            held[lightest] += clips[source]
            dealt[source] = lightest + 1
    return dealt


def numbers_of(facts: Sequence[ClipFacts], class_names: Sequence[str], fold: Fold) -> tuple[list[int], list[int]]:
    """The numbers of the clips that are trained on and of those that are held out; InputError for a fold that lacks a class."""
    dealt = folds_of(facts, len(class_names), fold.count)
    for number in range(1, fold.count + 1):
        there = {fact.label for fact in facts if dealt[fact.source] == number}
        if missing := [name for label, name in enumerate(class_names) if label not in there]:
            sources = [len({fact.source for fact in facts if fact.label == label}) for label in range(len(class_names))]
            counts = ", ".join(f"{name} in {count}" for name, count in zip(class_names, sources, strict=True))
            raise InputError(
                f"--fold {fold}: fold {number} would hold no clip of {', '.join(missing)}; every fold needs some of each class. "
                f"Train's sources with clips of a class: {counts}. Give fewer folds."
            )
    held_out = [number for number, fact in enumerate(facts) if dealt[fact.source] == fold.number]
    return [number for number, fact in enumerate(facts) if dealt[fact.source] != fold.number], held_out


def trained_on(source: ClipSource, share: float, fold: str | None) -> list[ClipFacts]:
    """The clips that a training with --fraction and --fold trains on, as its plan numbers them."""
    facts = source.facts
    if fold is not None:
        facts = [facts[number] for number in numbers_of(facts, source.class_names, parse_fold(fold))[0]]
    return [facts[number] for number in fraction(facts, share)]


class PartOfSource:
    """Some clips of a source, numbered anew in the same order: a split of its own."""

    def __init__(self, whole: ClipSource, numbers: Sequence[int], name: str) -> None:
        self._whole, self._numbers, self._name = whole, list(numbers), name
        self.facts: Sequence[ClipFacts] = [whole.facts[number] for number in numbers]
        self.class_names, self.stored, self.source = whole.class_names, whole.stored, whole.source

    def __reduce__(self) -> tuple[type[PartOfSource], tuple[ClipSource, list[int], str]]:
        return PartOfSource, (self._whole, self._numbers, self._name)

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        return self._whole.fetch(self._numbers[number], choose, with_points)

    def where(self, number: int) -> tuple[str, int]:
        return self._whole.where(self._numbers[number])

    def stage(self, folder: Path) -> None:
        self._whole.stage(folder)

    def graph(self, spec: ClipSpec, micro_batch: int, device: torch.device, threads: int, hw_decoder_load: float) -> Graph | None:
        graph = self._whole.graph(spec, micro_batch, device, threads, hw_decoder_load)
        if graph is not None:
            graph.numbers = self._numbers
        return graph

    def describe(self) -> list[str]:
        sources = len({fact.source for fact in self.facts})
        return [f"{len(self.facts)} clips of {sources} {'source' if sources == 1 else 'sources'}, {self._name}", *self._whole.describe()]

    def close(self) -> None:
        self._whole.close()
