"""All splits of one home, opened together, so that what is wrong with the last of them shows before hours of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clips.errors import InputError
from clips.manifest import fingerprint
from clips.words import counted

from .folds import Fold, PartOfSource, numbers_of, parse_fold
from .plan import balanced_labels
from .source import ClipSource, fraction, loader_for, open_source, splits_of


@dataclass(frozen=True)
class Home:
    """The splits that exist, train among them, and the numbers of the clips of train that are trained on."""

    sources: Mapping[str, ClipSource]
    subset: Sequence[int]
    labels: np.ndarray | None  # int64 (clips trained on,) where epochs are balanced

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.sources["train"].class_names

    @property
    def class_counts(self) -> list[int]:
        """Training clips of each class, as often as training sees them: all equal where epochs are balanced."""
        facts = self.sources["train"].facts
        counts = np.bincount([facts[number].label for number in self.subset], minlength=len(self.class_names)).tolist()
        return [1] * len(counts) if self.labels is not None else counts

    def fingerprints(self) -> dict[str, str]:
        """Of each split, sha256 of keys and labels: the same from npz and from shards."""
        parts = {split: source.facts for split, source in self.sources.items()} | {"train": [self.sources["train"].facts[number] for number in self.subset]}
        return {split: fingerprint([fact.key for fact in part], [fact.label for fact in part]) for split, part in parts.items()}

    def describe(self) -> list[str]:
        """Lines for the log: each split's clips of each class, and classes that it lacks."""
        lines = []
        for split, source in self.sources.items():
            counts = np.bincount([fact.label for fact in source.facts], minlength=len(self.class_names)).tolist()
            classes = ", ".join(f"{count} {name}" for count, name in zip(counts, self.class_names, strict=True))
            lines.append(f"{split}: {'; '.join(source.describe())} ({classes})")
            if 0 in counts:
                lines.append(f"{split}: has no clip of {', '.join(name for count, name in zip(counts, self.class_names, strict=True) if not count)}")
        return lines + self._leaks()

    def _leaks(self) -> list[str]:
        """A line on the splits that share sources with train, none where none does."""
        trained = {fact.source for fact in self.sources["train"].facts}
        shared = {split: len(trained & {fact.source for fact in source.facts}) for split, source in self.sources.items() if split != "train"}
        found = [f"{counted(count, 'source')} of {split}" for split, count in shared.items() if count]
        if not found:
            return []
        advice = "metrics there say little of new sources. Split by source, or hold sources out with --fold"
        return [f"leak: train has clips of {' and '.join(found)} too: {advice}"]


def open_home(home: Path, loader: str = "auto", share: float = 1.0, balance: bool = False, fold: str | None = None) -> Home:
    """Raises InputError without a split train, for splits of several shapes, and for a class without clips where epochs are to be balanced."""
    splits = splits_of(home)
    if "train" not in splits:
        raise InputError(f"--dataset-home {home}: no split train; found {', '.join(splits)}.")
    kind = loader_for(home) if loader == "auto" else loader
    sources = {split: open_source(home, split, kind) for split in splits}
    if len({source.stored for source in sources.values()}) > 1:
        shapes = ", ".join(f"{split} {source.stored}" for split, source in sources.items())
        raise InputError(f"--dataset-home {home}: one data set has one shape; found {shapes}.")
    if fold is not None:
        sources |= _folded(home, kind, sources, parse_fold(fold))
    train = sources["train"]
    subset = fraction(train.facts, share)
    labels = balanced_labels([train.facts[number] for number in subset], train.class_names) if balance else None
    return Home(sources, subset, labels)


def _folded(home: Path, kind: str, sources: Mapping[str, ClipSource], fold: Fold) -> dict[str, ClipSource]:
    """The other folds of train as train, and this one as val."""
    trained, held_out = numbers_of(sources["train"].facts, sources["train"].class_names, fold)
    if "val" in sources:
        sources["val"].close()
    again = open_source(home, "train", kind)  # of its own: each may be read by a process of its own
    parts = {"train": (sources["train"], trained, f"all but fold {fold} of train"), "val": (again, held_out, f"fold {fold} of train")}
    return {split: PartOfSource(*part) for split, part in parts.items()}
