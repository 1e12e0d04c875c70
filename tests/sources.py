"""Sources that do as the one inside them but for one thing. Without torch, so that a process beside may import them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clips.clip import ClipSpec
from loaders.source import ChooseFrames, ClipSource, Fetched, Frames, Loaded

if TYPE_CHECKING:
    import torch

    from loaders.finish import Graph

FATAL = 10  # the number of the clip at which something happens


class Around:
    """The one inside, unchanged."""

    def __init__(self, inside: ClipSource) -> None:
        self.inside = inside
        self.facts, self.class_names, self.stored, self.source = inside.facts, inside.class_names, inside.stored, inside.source

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        return self.inside.fetch(number, choose, with_points)

    def where(self, number: int) -> tuple[str, int]:
        return self.inside.where(number)

    def stage(self, folder: Path) -> None:
        self.inside.stage(folder)

    def graph(self, spec: ClipSpec, micro_batch: int, device: torch.device, threads: int, hw_decoder_load: float) -> Graph | None:
        return self.inside.graph(spec, micro_batch, device, threads, hw_decoder_load)

    def describe(self) -> list[str]:
        return self.inside.describe()

    def close(self) -> None:
        self.inside.close()


class ClipAround:
    """One clip of such a source."""

    def __init__(self, inside: Fetched) -> None:
        self.inside = inside

    def decode(self, frames: Frames) -> Loaded:
        return self.inside.decode(frames)

    def release(self) -> None:
        self.inside.release()


class Neighbour(Around):
    """Gives the next clip instead of the one asked for."""

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        return self.inside.fetch((number + 1) % len(self.facts), choose, with_points)


class Dividing(Around):
    """Divides by nought at one clip."""

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        assert 1 / (number - FATAL)
        return self.inside.fetch(number, choose, with_points)


class Dying(Around):
    """Ends its own process at one clip: by a signal, or as a C library does that calls exit."""

    def __init__(self, inside: ClipSource, signal: int) -> None:
        super().__init__(inside)
        self.signal = signal

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        if number == FATAL:
            if self.signal:
                os.kill(os.getpid(), self.signal)
            os._exit(3)
        return self.inside.fetch(number, choose, with_points)


class Crowded(Around):
    """Every point comes many times."""

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        return CrowdedClip(self.inside.fetch(number, choose, with_points))


class CrowdedClip(ClipAround):
    def decode(self, frames: Frames) -> Loaded:
        loaded = self.inside.decode(frames)
        return loaded if loaded.points is None else replace(loaded, points=np.tile(loaded.points, (2000, 1)))


class Busy(Around):
    """Its decoding takes a while, scribbling over its buffer meanwhile; it knows how many clips are being decoded and how many are held."""

    def __init__(self, inside: ClipSource, scribbles: int = 3000) -> None:
        super().__init__(inside)
        self.scribbles, self.lock = scribbles, threading.Lock()
        self.decoding, self.held, self.most_held = 0, 0, 0

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        clip = BusyClip(self, self.inside.fetch(number, choose, with_points))
        self.count(0, 1)
        return clip

    def count(self, decoding: int, held: int) -> None:
        with self.lock:
            self.decoding += decoding
            self.held += held
            self.most_held = max(self.most_held, self.held)


class BusyClip(ClipAround):
    def __init__(self, source: Busy, inside: Fetched) -> None:
        super().__init__(inside)
        self.source, self.is_held = source, True

    def decode(self, frames: Frames) -> Loaded:
        self.source.count(1, 0)
        for scribble in range(self.source.scribbles):
            frames.place(0).fill(scribble % 256)
        loaded = self.inside.decode(frames)
        self.source.count(-1, 0)
        self.release()
        return loaded

    def release(self) -> None:
        self.inside.release()
        if self.is_held:
            self.is_held = False
            self.source.count(0, -1)


class Gated(Around):
    """Notes the order in which clips are asked for; none is decoded before the gate opens."""

    def __init__(self, inside: ClipSource, note: Callable[[int], None]) -> None:
        super().__init__(inside)
        self.note, self.gate = note, threading.Event()

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> Fetched:
        self.note(number)
        return GatedClip(self.gate, self.inside.fetch(number, choose, with_points))


class GatedClip(ClipAround):
    def __init__(self, gate: threading.Event, inside: Fetched) -> None:
        super().__init__(inside)
        self.gate = gate

    def decode(self, frames: Frames) -> Loaded:
        assert self.gate.wait(60)
        return self.inside.decode(frames)
