"""What could be left out of decoding, what it saves, and what it does to the pixels: each way on the same frames and crops, on one core.

decode alone: the chosen frames to memory, as a GPU would get them     finished: the same, then crop, resize and flip, as on a CPU
difference:   of finished pixels, of 255, to those of the exact way
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import simplejpeg
import torch

from clips.clip import ClipSpec
from clips.codecs.jpeg import JpegCodec
from clips.errors import InputError
from clips.mix import uniforms
from clips.snippets import Content, find, read
from convert.encode import stored_frames
from convert.pack import stored_spec
from loaders.device import FinishingFrames
from loaders.sample import DRAWS, AugmentConfig, Box, View, frames_uniform, random_view

from .convert import QUALITY, chosen_clips
from .result import Result, as_word, cell, file_system_of, measure, pinned_to_one_core, result, table, write_results
from .turbojpeg import Decoder, find_library

Values = dict[str, list[float]]  # name of a way to one value a round

EXACT = "exact"
STORE_SIZE = 256
# JPEG's YCbCr to RGB, full range: red, green and blue from luma, blue and red difference (both less 128).
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@dataclass(frozen=True)
class ShortcutsConfig:
    """What each shortcut of decoding saves, and how far its pixels are from the exact ones."""

    dataset_home: Path
    """Snippets as npz."""
    clips: int = 16
    """How many of them, spread over all sources."""
    frames: int = 16
    """Frames of a finished clip."""
    size: int = 224
    """Pixels of a finished frame."""
    rounds: int = 7
    """Measured passes of each way, after one that warms up."""
    turbojpeg: Path | None = None
    """libturbojpeg.so of version 3 or later, for cropped decoding and planes; default: the system's."""
    json: Path | None = None
    """Append the results here."""

    def __post_init__(self) -> None:
        if self.clips < 1 or self.rounds < 1:
            raise InputError(f"--clips {self.clips} --rounds {self.rounds}: expected at least 1 of each.")


def bench_shortcuts(config: ShortcutsConfig) -> list[Result]:
    """Prints a table and gives the results."""
    home = find(config.dataset_home)
    chosen, recipe = chosen_clips(home, config.clips)
    contents = [read(home.path / snippet.path, recipe.source, recipe.names) for snippet in chosen]
    whole = ClipSpec(config.frames, recipe.source.height, recipe.source.width)
    clips = [_stored(content, whole, config.frames) for content in contents]
    ways: dict[str, tuple[Way, Sequence[Stored]]] = {name: (way, clips) for name, way in _ways(config, whole).items()}
    if min(whole.height, whole.width) > STORE_SIZE:
        smaller = stored_spec(whole, STORE_SIZE)
        kept = [_stored(content, smaller, config.frames) for content in contents]
        ways[f"stored at {STORE_SIZE} px"] = (_by_codec(smaller, config.size), kept)
    finished = np.ones((config.frames, config.size, config.size, 3), np.uint8)
    decoding: dict[str, Callable[[], object]] = {name: partial(_decode_all, way, of) for name, (way, of) in ways.items()}
    finishing: dict[str, Callable[[], object]] = {name: partial(_finish_all, way, of, finished) for name, (way, of) in ways.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pinned_to_one_core():
            decode_ms, _ = measure(decoding, len(clips), config.rounds)
            finish_ms, _ = measure(finishing, len(clips), config.rounds)
        differences = {name: _differences(ways, name, finished.shape) for name in ways if name != EXACT}
    finally:
        torch.set_num_threads(before)
    saved = {name: [100 * (1 - a / b) for a, b in zip(values, decode_ms[EXACT], strict=True)] for name, values in decode_ms.items()}
    setting = {"clips": len(clips), "frames": config.frames, "size": config.size, "stored": [whole.height, whole.width], "quality": QUALITY}
    found = [("decode", "CPU ms/clip", decode_ms), ("decode_saved", "%", saved), ("finished", "CPU ms/clip", finish_ms)]
    found += [("difference_mean", "of 255", {name: mean for name, (mean, _) in differences.items()})]
    found += [("difference_max", "of 255", {name: most for name, (_, most) in differences.items()})]
    results = [result(f"shortcuts/{as_word(name)}/{kind}", unit, values, setting) for kind, unit, of in found for name, values in of.items()]
    print(_table(decode_ms, saved, finish_ms, differences))
    if config.json:
        write_results(config.json, results, file_system_of(config.dataset_home))
    return results


@dataclass(frozen=True)
class Stored:
    """The chosen frames of one clip as JPEG, and the view that is taken of them."""

    blobs: Sequence[bytes]
    view: View


class Way(Protocol):
    """One way to decode."""

    def decode(self, clip: Stored) -> None:
        """All frames, to memory."""

    def finish(self, clip: Stored, out: np.ndarray) -> None:
        """Writes uint8 (T, S, S, 3)."""


class Frames:
    """RGB by `decode(blob, out, box)`, which writes at least the box into the frame `out`."""

    def __init__(self, decode: Callable[[bytes, np.ndarray, Box], object], stored: ClipSpec, size: int) -> None:
        self._decode, self._buffer = decode, np.ones(stored.video_shape, np.uint8)
        self._finishing = FinishingFrames(stored, (size, size))

    def decode(self, clip: Stored) -> None:
        for blob, frame in zip(clip.blobs, self._buffer, strict=True):
            self._decode(blob, frame, clip.view.box)

    def finish(self, clip: Stored, out: np.ndarray) -> None:
        frames = self._finishing(out, clip.view)
        for number, blob in enumerate(clip.blobs):
            self._decode(blob, frames.place(number), clip.view.box)
            frames.done(number)


class Planes:
    """Luma and half as large colour planes: half the bytes of RGB; `finish` crops and resizes the planes and makes RGB of the small ones."""

    def __init__(self, decoder: Decoder, stored: ClipSpec, size: int) -> None:
        frames, height, width = stored.mask_shape
        self._decoder, self._size = decoder, size
        self._luma = np.ones((frames, height, width), np.uint8)
        self._colour = np.ones((2, frames, height // 2, width // 2), np.uint8)

    def decode(self, clip: Stored) -> None:
        for number, blob in enumerate(clip.blobs):
            self._decoder.decode_planes(blob, self._luma[number], self._colour[0, number], self._colour[1, number])

    def finish(self, clip: Stored, out: np.ndarray) -> None:
        self.decode(clip)
        torch.from_numpy(out).copy_(to_rgb(torch.from_numpy(self._luma), torch.from_numpy(self._colour), clip.view, self._size))


def to_rgb(luma: torch.Tensor, colour: torch.Tensor, view: View, size: int) -> torch.Tensor:
    """uint8 (T, S, S, 3) from planes uint8 (T, H, W) and (2, T, H / 2, W / 2): the view's box, sampled from each plane where it lies in it."""
    box = view.box
    rows = (torch.arange(size) + 0.5) * (box.height / size) + box.top  # in pixels of the luma plane, from its edge
    columns = (torch.arange(size) + 0.5) * (box.width / size) + box.left
    columns = columns.flip(0) if view.flip else columns
    planes = [_sampled(luma, rows, columns), *(_sampled(plane, rows / 2, columns / 2) - 128 for plane in colour)]
    return (torch.stack(planes, dim=-1) @ torch.tensor(TO_RGB).T).round_().clamp_(0, 255).to(torch.uint8)


def _sampled(plane: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """fp32 (T, S, S) from (T, H, W), bilinearly at places counted from the plane's edge."""
    height, width = plane.shape[1:]
    x = columns / width * 2 - 1
    y = rows / height * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
    return torch.nn.functional.grid_sample(plane[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _ways(config: ShortcutsConfig, stored: ClipSpec) -> dict[str, Way]:
    """All that work on frames as they are stored."""
    ways: dict[str, Way] = {EXACT: _by_codec(stored, config.size)}
    for name, (upsample, dct) in {"fast upsampling": (True, False), "fast DCT": (False, True), "both fast": (True, True)}.items():
        ways[name] = Frames(partial(_fast, upsample, dct), stored, config.size)
    library = find_library(config.turbojpeg)
    if library is None:
        print("cropped decoding and planes are left out: no libturbojpeg of version 3 found; --turbojpeg takes its path")
        return ways
    ways["crop alone"] = Frames(Decoder(library).decode_box, stored, config.size)
    if stored.height % 2 == stored.width % 2 == 0:
        ways["planes"] = Planes(Decoder(library), stored, config.size)
    return ways


def _by_codec(stored: ClipSpec, size: int) -> Frames:
    codec = JpegCodec()
    return Frames(lambda blob, out, box: codec.decode(blob, out), stored, size)


def _fast(upsample: bool, dct: bool, blob: bytes, out: np.ndarray, box: Box) -> None:
    simplejpeg.decode_jpeg(blob, colorspace="RGB", fastupsample=upsample, fastdct=dct, buffer=out, strict=True)


def _stored(content: Content, stored: ClipSpec, num_frames: int) -> Stored:
    """A clip's chosen frames in the stored size, with a crop and flip of its own."""
    frames = content.video[frames_uniform(num_frames, content.frames_valid, None)]
    codec = JpegCodec(QUALITY)
    draws = uniforms(DRAWS, "shortcuts", hashlib.sha256(frames[0].tobytes()).hexdigest())
    blobs = [codec.encode(frame) for frame in stored_frames(frames, stored)]
    return Stored(blobs, random_view(stored.height, stored.width, draws, AugmentConfig(), 0.5))


def _decode_all(way: Way, clips: Sequence[Stored]) -> None:
    for clip in clips:
        way.decode(clip)


def _finish_all(way: Way, clips: Sequence[Stored], out: np.ndarray) -> None:
    for clip in clips:
        way.finish(clip, out)


def _differences(ways: Mapping[str, tuple[Way, Sequence[Stored]]], name: str, shape: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Mean and greatest difference of each clip's finished pixels to the exact ones."""
    (exact, exact_clips), (way, clips) = ways[EXACT], ways[name]
    one, other = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    means, most = [], []
    for exact_clip, clip in zip(exact_clips, clips, strict=True):
        exact.finish(exact_clip, one)
        way.finish(clip, other)
        apart = np.abs(one.astype(np.int16) - other)
        means.append(float(apart.mean()))
        most.append(float(apart.max()))
    return means, most


def _table(decode_ms: Values, saved: Values, finish_ms: Values, differences: Mapping[str, tuple[list[float], list[float]]]) -> str:
    header = ["way", "decode, CPU ms/clip", "saved, %", "finished, CPU ms/clip", "mean difference", "greatest"]
    rows = []
    for name in decode_ms:
        apart = [cell(differences[name][0], 2), f"{max(differences[name][1]):.0f}"] if name in differences else ["-", "-"]
        rows.append([name, cell(decode_ms[name], 2), cell(saved[name], 0), cell(finish_ms[name], 2), *apart])
    return table(header, rows)
