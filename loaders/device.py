"""From decoded frames on the host to a finished batch on the device: upload -> crop -> resize -> flip, in uint8 throughout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from clips.clip import ClipSpec

from .batch import Batch
from .decode import RawBatch
from .sample import View, move_points
from .source import ClipSource


class Finisher:
    """Makes batches of `size` pixels on `device`; on a GPU the upload runs on a stream of its own."""

    def __init__(self, source: ClipSource, spec: ClipSpec, device: torch.device, with_points: bool) -> None:
        self._source, self._spec, self._device, self._with_points = source, spec, device, with_points
        self._upload = torch.cuda.Stream(device) if device.type == "cuda" else None

    def finish(self, raw: RawBatch) -> Batch:
        views = [request.view for request in raw.requests]
        video = crop_resize_flip(self._to_device(raw.video), views, (self._spec.height, self._spec.width))
        keypoints = self._masks(raw, views) if self._with_points else None
        self._release_when_copied(raw)
        return Batch(
            video=video,
            keypoints=keypoints,
            label=self._small([clip.label for clip in raw.clips]),
            weight=torch.ones(len(raw.clips), device=self._device),
            key=[clip.key for clip in raw.clips],
            number=[request.number for request in raw.requests],
        )

    def _small(self, values: Sequence[int]) -> torch.Tensor:
        """int64 (B,) on the device; from pinned memory, so that the host does not wait for the step under way."""
        pinned = self._device.type == "cuda"
        return torch.tensor(values, pin_memory=pinned).to(self._device, non_blocking=pinned)

    def _to_device(self, video: torch.Tensor) -> torch.Tensor:
        if self._upload is None:
            return video
        with torch.cuda.stream(self._upload):
            uploaded = video.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._upload)
        uploaded.record_stream(current)
        return uploaded

    def _release_when_copied(self, raw: RawBatch) -> None:
        if self._upload is not None:
            self._upload.synchronize()  # the copy alone, not the step; decoding must not write into a buffer that is still read
        raw.release()

    def _masks(self, raw: RawBatch, views: Sequence[View]) -> torch.Tensor:
        """0/1 uint8 (B, T, H, W): the points moved as the pixels were, then drawn; clips without keypoints have zeros."""
        stored, source = self._source.stored, self._source.source
        size = (self._spec.height, self._spec.width)
        places = []
        for place, (clip, view) in enumerate(zip(raw.clips, views, strict=True)):
            if clip.points is not None:
                moved = move_points(clip.points, view, (stored.height, stored.width), (source.height, source.width), size)
                places.append(np.concatenate([np.full((len(moved), 1), place), moved], axis=1))
        masks = torch.zeros((len(views), *self._spec.mask_shape), dtype=torch.uint8, device=self._device)
        if places:
            masks[tuple(torch.from_numpy(np.concatenate(places)).to(self._device).T)] = 1
        return masks


def crop_resize_flip(video: torch.Tensor, views: Sequence[View], size: tuple[int, int]) -> torch.Tensor:
    """uint8 (B, T, h, w, 3) contiguous, a new tensor: each clip's box resized bilinearly (half-pixel centres, no antialiasing) and flipped.

    On a CPU torch's uint8 kernel differs from its float one by at most 1 of 255.
    """
    out = torch.empty((len(views), video.shape[1], *size, video.shape[4]), dtype=torch.uint8, device=video.device)
    for clip, view, target in zip(video, views, out, strict=True):
        box = view.box
        region = clip[:, box.top : box.top + box.height, box.left : box.left + box.width]
        resized = resize(region, size)
        target.copy_(resized.flip(2) if view.flip else resized)
    return out


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (T, h, w, 3) from uint8 (T, H, W, 3), rounded to the nearest."""
    if frames.shape[1:3] == size:
        return frames
    channels_last = frames.permute(0, 3, 1, 2)  # a view: (T, 3, H, W) whose memory is still (T, H, W, 3)
    if frames.is_cuda:
        smaller = F.interpolate(channels_last.float(), size, mode="bilinear", align_corners=False).round().to(torch.uint8)
    else:
        smaller = F.interpolate(channels_last, size, mode="bilinear", align_corners=False)
    return smaller.permute(0, 2, 3, 1)
