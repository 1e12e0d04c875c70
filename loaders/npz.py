"""Clips out of the unconverted folder: the baseline. Each load inflates a whole video, 20 to 25 ms of a core by isal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clips.clip import ClipSpec
from clips.errors import ClipError, InputError
from clips.format import ClipFacts
from clips.npz import BadNpz
from clips.snippets import ArrayNames, Content, Snippet, check_headers, find, list_bad, read, unlabelled

from .shards import points_of_frames
from .source import ChooseFrames, Frames, Loaded

if TYPE_CHECKING:
    import torch

    from .finish import Graph

WITHOUT_MASK = ArrayNames(keypoints_mode="none")


class NpzSource:
    """A split of DATASET_HOME/SPLIT/CLASS/*.npz, keypoints optional."""

    def __init__(self, home: Path, split: str) -> None:
        found = find(home)
        if split not in found.splits:
            raise InputError(f"--dataset-home {home}: no snippets in split {split}; there are some in {', '.join(found.splits)}.")
        self._take(home, found.splits[split], found.classes, ArrayNames(keypoints_mode="optional"))

    @classmethod
    def of_paths(cls, paths: Sequence[Path], class_names: tuple[str, ...]) -> NpzSource:
        """Unlabelled snippets: npz files, or folders with such at any depth. Keys are paths as given, without suffix; labels are -1."""
        files: list[Path] = []
        for path in paths:
            below = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
            if not below or not all(file.is_file() for file in below):
                raise InputError(f"{path}: expected an npz file or a folder that holds some; found {'no npz in it' if path.is_dir() else 'nothing there'}.")
            files += below
        for file in files:
            if not str(file).isprintable():
                raise InputError(f"{str(file)!r} is not a printable UTF-8 name. Rename the file.")
        snippets = [unlabelled(file) for file in dict.fromkeys(files)]
        source = cls.__new__(cls)
        source._take(Path(), tuple(sorted(snippets, key=lambda snippet: snippet.key.encode())), class_names, WITHOUT_MASK)
        return source

    def _take(self, home: Path, snippets: tuple[Snippet, ...], class_names: tuple[str, ...], names: ArrayNames) -> None:
        self._names = names
        spec, _, bad = check_headers(home, snippets, self._names)
        if bad:
            raise list_bad(bad, len(snippets), "Mend or move these files.")
        self._home, self._snippets, self.class_names, self.stored, self.source = home, snippets, class_names, spec, spec
        # frames_valid is known only once a file is inflated; until then all frames count
        self.facts = [ClipFacts(s.key, s.label, s.source, s.index, s.begin_ms, s.end_ms, spec.frames) for s in snippets]

    def graph(self, spec: ClipSpec, micro_batch: int, device: torch.device, threads: int, hw_decoder_load: float) -> Graph | None:
        return None

    def describe(self) -> list[str]:
        return [
            f"{len(self.facts)} clips in single npz files, frames of {self.stored}",
            "packing them once would cut the loader's CPU time to about a quarter (python -m benchmarks loader measures it here): "
            f"python -m convert pack --dataset-home {self._home} --output SHARDS",
        ]

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> WholeFile:
        return WholeFile(self, self._snippets[number], choose, with_points)

    def content(self, snippet: Snippet, with_points: bool) -> Content:
        """The inflated file; raises ClipError."""
        try:
            return read(self._home / snippet.path, self.source, self._names if with_points else WITHOUT_MASK)  # no mask is inflated in vain
        except BadNpz as error:
            raise ClipError(f"{self._home / snippet.path}: clip '{snippet.key}': {error}. Mend or move the file.") from error

    def where(self, number: int) -> tuple[str, int]:
        return self._snippets[number].path, 0

    def stage(self, folder: Path) -> None:
        raise InputError(f"--stage-dir {folder}: only shards are staged, {self._home} holds npz files. Pack them, or leave --stage-dir out.")

    def close(self) -> None:
        """Nothing is kept open."""


@dataclass(frozen=True)
class WholeFile:
    """One npz: it is read when it is decoded, for inflating takes a hundred times as long."""

    _source: NpzSource
    _snippet: Snippet
    _choose: ChooseFrames
    _with_points: bool

    def decode(self, frames: Frames) -> Loaded:
        content = self._source.content(self._snippet, self._with_points)
        chosen = self._choose(content.frames_valid)
        for number, frame in enumerate(chosen.tolist()):
            frames.place(number)[...] = content.video[frame]
            frames.done(number)
        points = points_of_frames(content.points, chosen) if self._with_points and content.points is not None else None
        return Loaded(self._snippet.key, self._snippet.label, points)

    def release(self) -> None:
        """Nothing is held."""
