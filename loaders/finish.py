"""RawBatch to Batch: on a GPU upload -> crop -> resize -> flip -> paint, on a CPU the decoding threads have done that already.

A graph (DALI's) does all but the paint by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from clips.clip import ClipSpec

from .batch import BadClip, Batch, Slowest
from .certificate import proof_sum, spelled
from .decode import Outcome, RawBatch
from .device import crop_resize_flip, paint, to_device
from .requests import Request
from .sample import View, move_points, whole_view
from .source import ClipSource


@dataclass(frozen=True)
class Resized:
    """Clips on the device, uint8 (B, T, h, w, 3), cropped, resized and flipped but not painted; zeros where there is an error."""

    video: torch.Tensor
    requests: Sequence[Request]
    outcomes: Sequence[Outcome]


class Graph(Protocol):
    """What decodes and resizes whole batches on the device, from rows that the threads wrote; one pass at a time."""

    row_shape: tuple[int, ...]  # of the bytes of one frame, as the threads write them
    numbers: Sequence[int] | None  # of a part's clips in its source, where the requests count in the part

    def run(self, batches: Iterator[RawBatch]) -> Iterator[Resized]:
        """The same batches in the same order."""

    def close(self) -> None:
        """Gives the device's memory back."""


@dataclass(frozen=True)
class Finisher:
    """Makes batches of `spec` on `device`; `epoch` None in evaluation."""

    source: ClipSource
    spec: ClipSpec
    device: torch.device
    with_points: bool
    is_finished: bool  # whether the raw batches have the final size already
    upload: torch.cuda.Stream | None

    def finish(self, raw: RawBatch | Resized, epoch: int | None) -> Batch:
        facts = self.source.facts
        loaded = [outcome.loaded for outcome in raw.outcomes]
        unpainted = whole_view(self.source.stored.height, self.source.stored.width)  # a clip that could not be read stays zeros
        views = [request.view if clip else unpainted for request, clip in zip(raw.requests, loaded, strict=True)]
        planned = [facts[request.number] for request in raw.requests]
        labels = [clip.label if clip else fact.label for clip, fact in zip(loaded, planned, strict=True)]
        keypoints = self._masks(raw, views) if self.with_points else None
        bad = [
            BadClip(request.position, fact.key, outcome.error)
            for request, fact, outcome in zip(raw.requests, planned, raw.outcomes, strict=True)
            if outcome.loaded is None
        ]
        slowest = _slowest(self.source, raw.requests, raw.outcomes)
        video = self._video(raw, views)  # gives the buffer back: last
        return Batch(
            video=video,
            keypoints=keypoints,
            label=self._small(labels, torch.int64),
            weight=self._small([float(clip is not None) for clip in loaded], torch.float32),
            key=[clip.key if clip else fact.key for clip, fact in zip(loaded, planned, strict=True)],
            number=[request.number for request in raw.requests],
            position=[request.position for request in raw.requests],
            labels=[clip.label for clip in loaded if clip],
            proof=_proof(raw, epoch),
            bad=bad,
            slowest=slowest,
        )

    def _video(self, raw: RawBatch | Resized, views: Sequence[View]) -> torch.Tensor:
        if isinstance(raw, Resized):
            paint(raw.video, views)
            return raw.video
        if self.is_finished:  # no copy: the buffer returns to the threads when the last tensor that shares its memory is gone
            view = raw.video[:]
            weakref.finalize(view, raw.release).atexit = False
            return torch.from_numpy(view)
        video = torch.from_numpy(raw.video)
        size = (self.spec.height, self.spec.width)
        if self.upload is None:
            finished = crop_resize_flip(video, views, size)
        else:
            finished = crop_resize_flip(to_device(video, self.device, self.upload), views, size)
            self.upload.synchronize()  # the copy alone, not the step; decoding must not write into a buffer that is still read
        raw.release()
        return finished

    def _small(self, values: Sequence[int | float], dtype: torch.dtype) -> torch.Tensor:
        """(B,) on the device; from pinned memory, so that the host does not wait for the step under way."""
        pinned = self.device.type == "cuda"
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(self.device, non_blocking=pinned)

    def _masks(self, raw: RawBatch | Resized, views: Sequence[View]) -> torch.Tensor:
        """0/1 uint8 (B, T, H, W): the points moved as the pixels were, then drawn; clips without keypoints have zeros."""
        stored, source = self.source.stored, self.source.source
        size = (self.spec.height, self.spec.width)
        places = []
        for place, (outcome, view) in enumerate(zip(raw.outcomes, views, strict=True)):
            if outcome.loaded and outcome.loaded.points is not None:
                moved = move_points(outcome.loaded.points, view, (stored.height, stored.width), (source.height, source.width), size)
                places.append(np.concatenate([np.full((len(moved), 1), place), moved], axis=1))
        masks = torch.zeros((len(views), *self.spec.mask_shape), dtype=torch.uint8, device=self.device)
        if places:
            masks[tuple(torch.from_numpy(np.concatenate(places)).to(self.device).T)] = 1
        return masks


def _proof(raw: RawBatch | Resized, epoch: int | None) -> int:
    """The batch's part of its epoch's certificate; 0 in evaluation."""
    if epoch is None:
        return 0
    read = [(request.position, one.loaded) for request, one in zip(raw.requests, raw.outcomes, strict=True) if one.loaded]
    return proof_sum(epoch, [position for position, _ in read], [spelled(clip.key, clip.label) for _, clip in read])


def _slowest(source: ClipSource, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> Slowest:
    times = [(max(one.read_s, one.decode_s), place) for place, one in enumerate(outcomes)]
    longest_s, place = max(times)
    stage = "read" if outcomes[place].read_s >= outcomes[place].decode_s else "decode"
    return Slowest(stage, source.where(requests[place].number)[0], 1000 * longest_s)
