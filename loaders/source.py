"""Where clips come from: one interface for shards and for the unconverted folder, so that order, frames and crops are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from clips.clip import ClipSpec
from clips.errors import InputError
from clips.format import ClipFacts
from clips.glimpse import expect_shards, hint_at
from clips.manifest import is_packed, read_manifest
from clips.mix import hash64
from clips.registry import resolve
from clips.snippets import SPLITS

from . import LOADERS

if TYPE_CHECKING:  # a process beside the training imports this file, and no torch
    import torch

    from .finish import Graph

ChooseFrames = Callable[[int], np.ndarray]  # from the number of valid frames to the chosen ones (T,)


@dataclass(frozen=True)
class Loaded:
    """What came with the frames: key and label as the clip itself says, and its chosen frames' points (N, 3) of t, y, x."""

    key: str
    label: int
    points: np.ndarray | None


class Frames(Protocol):
    """Where the frames of one clip go, one after another."""

    def place(self, number: int) -> np.ndarray:
        """Where the chosen frame of that number is to be written: contiguous uint8 (H, W, 3) of the stored geometry."""

    def done(self, number: int) -> None:
        """It was written; its place may be the next one's too."""


class Fetched(Protocol):
    """One clip's bytes, read but not decoded."""

    def decode(self, frames: Frames) -> Loaded:
        """Checks and decodes the chosen frames, in order, and lets the bytes go; raises ClipError naming the clip."""

    def release(self) -> None:
        """Gives the bytes' buffer back without decoding; harmless after `decode`."""


class ClipSource(Protocol):
    """One split, its clips numbered by sorted key (UTF-8 bytes). It can be pickled: another process opens it again."""

    facts: Sequence[ClipFacts]
    class_names: tuple[str, ...]
    stored: ClipSpec  # the geometry of the frames that are written
    source: ClipSpec  # the geometry that points are in

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        """Reads what is needed of one clip, from several threads at once; raises ClipError naming the clip."""

    def where(self, number: int) -> tuple[str, int]:
        """The file that holds the clip and the place in it: neighbours are read one after another."""

    def stage(self, folder: Path) -> None:
        """Begins to copy what is read to a local folder; raises InputError where that makes no sense."""

    def graph(self, spec: ClipSpec, micro_batch: int, device: torch.device, threads: int, hw_decoder_load: float) -> Graph | None:
        """What decodes, crops, resizes and flips on the device in place of our own code; None where our own code does."""

    def describe(self) -> list[str]:
        """Lines for the log."""

    def close(self) -> None:
        """Gives files back."""


def open_source(home: Path, split: str, loader: str = "auto") -> ClipSource:
    """The split's clips; `auto` takes webdataset for a folder of shards and npz for one of snippets."""
    name = loader_for(home) if loader == "auto" else loader
    kind = resolve(LOADERS, name, "--loader")
    if name == "npz" and is_packed(home):
        raise InputError(f"--loader npz: {home} holds shards. Leave --loader out, or give the folder of npz snippets.")
    if name == "webdataset":  # dali says it by itself
        expect_shards(home)
    source: ClipSource = kind(home, split)
    return source


def loader_for(home: Path) -> str:
    return "webdataset" if is_packed(home) else "npz"


def splits_of(home: Path) -> list[str]:
    """The splits under a home of either kind; InputError where there is none."""
    if not home.is_dir():
        raise InputError(f"--dataset-home {home}: no such folder; expected shards (manifest.json) or {{train,val,test}}/CLASS/*.npz.")
    if is_packed(home):
        return [split for split in SPLITS if split in read_manifest(home).splits]
    splits = [split for split in SPLITS if any((home / split).glob("*/*.npz")) or (home / split / "plan.json").is_file()]
    if any((home / split / "plan.json").is_file() for split in splits):
        raise InputError(f"--dataset-home {home}: shards without a manifest: packing has not ended. Run the same python -m convert pack again.")
    if not splits:
        raise InputError(f"--dataset-home {home}: neither shards (manifest.json) nor snippets ({{train,val,test}}/CLASS/*.npz) below it.{hint_at(home)}")
    return splits


def fraction(facts: Sequence[ClipFacts], share: float) -> list[int]:
    """The numbers of a nested, stratified part: of each class the first `share` of its clips, rounded up, by their keys' hash."""
    if not 0 < share <= 1:
        raise InputError(f"--fraction {share}: expected above 0 and at most 1.")
    exact = Fraction(str(share))  # as written: in floats .07 of 100 clips is a bit more than 7, which rounds up to 8
    chosen: list[int] = []
    for label in {fact.label for fact in facts}:
        members = sorted((number for number, fact in enumerate(facts) if fact.label == label), key=lambda number: hash64("fraction", facts[number].key))
        chosen += members[: math.ceil(len(members) * exact)]
    return sorted(chosen)
