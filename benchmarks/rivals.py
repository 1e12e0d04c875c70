"""webdataset without our loader, on the same tars and to the same batches: what ours is compared with.

as documented: WebDataset.shuffle(1000).decode().map(one clip).batched(B) -> WebLoader, as webdataset's own examples are put together.
    `decode` unpacks frames.mp; Pillow, webdataset's decoder of pictures, decodes all frames of the clip; then 16 of them are taken,
    made float, cropped, resized, flipped and rounded; webdataset's collation makes the batch in the worker.
with care: only the members that are needed are taken from the tar, only the chosen frames are decoded, by our decoder with our flags into one
    buffer; crop and resize stay uint8; torch's collation writes the batch straight into shared memory; torch's DataLoader.

Both draw frames, crop and flip as ours do, but from a generator without seed; neither checks a crc32, keeps an order or can resume.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgpack
import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from clips.codecs.jpeg import JpegCodec
from loaders.sample import DRAWS, AugmentConfig, View, frames_uniform, random_view

MEMBERS = (".frames.mp", ".json", ".cls")
SHARD_SHUFFLE, CLIP_SHUFFLE = 100, 1000  # as in webdataset's examples; 100 clips are read before the first comes out
CAREFUL_SHUFFLE = 100

Clip = tuple[str, torch.Tensor, int]  # key, video uint8 (T, S, S, 3), label
Batches = Iterable[tuple[Sequence[str], torch.Tensor, Sequence[int]]]  # each iteration is one pass: keys, video uint8 (B, T, S, S, 3), labels


@dataclass(frozen=True)
class Task:
    """What a finished batch is, and how many worker processes make it; with 0 the asking process does."""

    frames: int
    size: int
    batch: int
    workers: int


class Rival:
    """One of them, its worker processes kept from pass to pass."""

    def __init__(self, make: Callable[[Sequence[str], Task], Batches], task: Task, tars: Sequence[str]) -> None:
        self._batches: Batches | None = make(tars, task)

    def clips(self) -> Iterator[int]:
        """The number of clips of each batch of a pass."""
        assert self._batches is not None, "closed"
        for _, video, _ in self._batches:
            yield len(video)

    def close(self) -> None:
        """The workers end with the last mention of the loader."""
        self._batches = None


def documented(tars: Sequence[str], task: Task) -> Batches:
    """As its documentation shows it."""
    dataset = (
        webdataset.WebDataset(list(tars), shardshuffle=SHARD_SHUFFLE).shuffle(CLIP_SHUFFLE).decode().map(partial(_plain_clip, task)).batched(task.batch)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=task.workers, persistent_workers=task.workers > 0)


def careful(tars: Sequence[str], task: Task) -> Batches:
    """As one writes it who has measured."""
    dataset = (
        webdataset.WebDataset(list(tars), shardshuffle=SHARD_SHUFFLE, select_files=_is_needed)
        .shuffle(CAREFUL_SHUFFLE)
        .compose(partial(_careful_clips, task))
        .batched(task.batch, collation_fn=default_collate)
    )
    return DataLoader(dataset, batch_size=None, num_workers=task.workers, persistent_workers=task.workers > 0)


def _is_needed(member: str) -> bool:
    return member.endswith(MEMBERS)


def _plain_clip(task: Task, sample: dict[str, Any]) -> Clip:  # Any: webdataset's decoded members
    frames = np.stack([np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in sample["frames.mp"]["frames"]])
    chosen, view = _chance(task, sample["json"]["frames_valid"], frames.shape[1], frames.shape[2])
    video = torch.from_numpy(frames[chosen]).permute(0, 3, 1, 2).float()
    resized = _resized(video, view, task.size).round().to(torch.uint8)
    return sample["__key__"], resized.permute(0, 2, 3, 1).contiguous(), sample["cls"]


def _careful_clips(task: Task, samples: Iterator[dict[str, Any]]) -> Iterator[Clip]:  # Any: bytes, and text for the key
    codec = JpegCodec()
    buffer: np.ndarray | None = None
    for sample in samples:
        packed = msgpack.unpackb(sample["frames.mp"])
        _, height, width, channels = packed["shape"]
        chosen, view = _chance(task, json.loads(sample["json"])["frames_valid"], height, width)
        if buffer is None or buffer.shape[1:] != (height, width, channels):
            buffer = np.empty((task.frames, height, width, channels), np.uint8)
        for place, frame in enumerate(chosen):
            codec.decode(packed["frames"][frame], buffer[place])
        resized = _resized(torch.from_numpy(buffer).permute(0, 3, 1, 2), view, task.size)
        yield sample["__key__"], resized.permute(0, 2, 3, 1), int(sample["cls"])


def _chance(task: Task, frames_valid: int, height: int, width: int) -> tuple[np.ndarray, View]:
    """The chosen frames (T,) and one view of them, drawn as our loader draws them."""
    chance = np.random.default_rng()
    view = random_view(height, width, chance.random(DRAWS), AugmentConfig(), 0.5)
    return frames_uniform(task.frames, frames_valid, chance.random(task.frames)), view


def _resized(video: torch.Tensor, view: View, size: int) -> torch.Tensor:
    """(T, 3, S, S) of the same dtype, from (T, 3, H, W)."""
    box = view.box
    region = video[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
    resized = F.interpolate(region, (size, size), mode="bilinear", align_corners=False)
    return resized.flip(3) if view.flip else resized
