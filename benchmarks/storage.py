"""What storage costs: PSNR, bytes, decode and encode time of each way to store the frames, on the same clips, every way in each round."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from clips.clip import ClipSpec
from clips.codecs import Codec
from clips.codecs.jpeg import JpegCodec
from clips.codecs.zstd import ZstdCodec
from clips.errors import InputError
from clips.format import pack_frames
from clips.snippets import Content, find, read
from convert.encode import stored_frames
from convert.members import psnr_db
from convert.pack import stored_spec
from loaders.sample import frames_uniform

from .convert import chosen_clips
from .result import Result, cell, file_system_of, markdown, pinned_to_one_core, result, write_results

FRAMES = 16  # that a model looks at
QUALITIES = (50, 75, 85, 90, 95, 98)
STORE_SIZES = (256, 224)
STORE_SIZE = "store size (PSNR of resized frames)"
LEVELS = (1, 3, 9)
QUALITY = 90
# Where the plot has room for the labels of a family or a way: right (1) or left, above (1) or below. Otherwise it is left and above.
Sides = dict[str, tuple[Literal[1, -1], Literal[1, -1]]]
KEPT_SIDES: Sides = {"jpeg quality": (1, -1)}
DECODE_SIDES: Sides = {STORE_SIZE: (1, -1), "zstd 1": (1, -1), "zstd 9": (-1, -1)}


@dataclass(frozen=True)
class StorageBenchConfig:
    """PSNR, MB and CPU ms a clip of each way to store the frames, on your snippets."""

    dataset_home: Path
    """Snippets as npz."""
    clips: int = 16
    """How many of them, spread over all sources."""
    rounds: int = 3
    """Measured passes over the clips, after one that warms up."""
    json: Path | None = None
    """Append the results here."""
    plot: Path | None = None
    """Draw PSNR and decode time against MB here, as PNG."""

    def __post_init__(self) -> None:
        if self.clips < 1 or self.rounds < 1:
            raise InputError(f"--clips {self.clips} --rounds {self.rounds}: expected at least 1 of each.")


class Subsampled(JpegCodec):
    """As our codec, with another subsampling of colour."""

    def __init__(self, quality: int, subsampling: str) -> None:
        super().__init__(quality)
        self._subsampling = subsampling

    def encode(self, frame: np.ndarray) -> bytes:
        blob: bytes = simplejpeg.encode_jpeg(frame, quality=self.quality, colorspace="RGB", colorsubsampling=self._subsampling, fastdct=False)
        return blob


class Progressive(JpegCodec):
    """As our codec, but progressive; by Pillow, because simplejpeg writes baseline alone. Read by simplejpeg as the others."""

    def encode(self, frame: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=self.quality, subsampling="4:2:0", progressive=True)
        return file.getvalue()


@dataclass(frozen=True)
class Way:
    """One way to store frames; `family` names what is varied."""

    name: str
    family: str
    codec: Codec
    store_size: int | None = None


@dataclass
class Cost:
    """What a way costs: of each clip, and of each round as CPU ms a clip."""

    psnr_db: list[float] = field(default_factory=list)
    mb: list[float] = field(default_factory=list)
    npz_share: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    encode_ms: list[float] = field(default_factory=list)


def ways(shorter_side: int) -> list[Way]:
    """All that are measured; store sizes that are none for these clips are left out."""
    jpeg = [Way(f"jpeg {quality}", "jpeg quality", JpegCodec(quality)) for quality in QUALITIES]
    colour = [Way(f"jpeg {QUALITY}, 4:{name[1]}:{name[2]}", "subsampling", Subsampled(QUALITY, name)) for name in ("422", "444")]
    progressive = [Way(f"jpeg {QUALITY}, progressive", "progressive", Progressive(QUALITY))]
    smaller = [Way(f"jpeg {QUALITY}, {size} px", STORE_SIZE, JpegCodec(QUALITY), size) for size in STORE_SIZES if size < shorter_side]
    return [*jpeg, *colour, *progressive, *smaller, *(Way(f"zstd {level}", "zstd level", ZstdCodec(level)) for level in LEVELS)]


def bench_storage(config: StorageBenchConfig) -> list[Result]:
    """Prints a Markdown table and gives the results."""
    home = find(config.dataset_home)
    chosen, recipe = chosen_clips(home, config.clips)
    spec = recipe.source
    costs = {way: Cost() for way in ways(min(spec.height, spec.width))}
    with pinned_to_one_core():
        for number in range(config.rounds + 1):
            spent: dict[Way, list[tuple[float, float]]] = {way: [] for way in costs}
            for snippet in chosen:
                content = read(home.path / snippet.path, spec, recipe.names)
                for way, cost in costs.items():
                    spent[way].append(_store(way, content, spec, snippet.file_bytes, None if number else cost))
            for way, cost in costs.items() if number else ():
                encode_ms, decode_ms = zip(*spent[way], strict=True)
                cost.encode_ms.append(statistics.fmean(encode_ms))
                cost.decode_ms.append(statistics.fmean(decode_ms))
    setting = {"clips": len(chosen), "video": list(spec.video_shape), "decoded_frames": min(FRAMES, spec.frames)}
    results = [one for way, cost in costs.items() for one in _results(way, cost, setting)]
    print(_table(costs, spec))
    print("\n¹ Against the resized frames: what resizing takes away is not in it.")
    if config.json:
        write_results(config.json, results, file_system_of(config.dataset_home))
    if config.plot:
        _draw(config.plot, costs)
    return results


def _store(way: Way, content: Content, spec: ClipSpec, npz_bytes: int, cost: Cost | None) -> tuple[float, float]:
    """CPU ms to encode all frames and to decode those that a model looks at; PSNR and bytes go to `cost`."""
    begun = time.process_time()
    smaller = stored_frames(content.video, stored_spec(spec, way.store_size))
    blobs = [way.codec.encode(frame) for frame in smaller]
    encoded = time.process_time()
    out = np.full_like(smaller, 1)  # written to, so that the system gives its memory before the decoding is timed
    picked = frames_uniform(min(FRAMES, spec.frames), content.frames_valid, None)
    before = time.process_time()
    for t in picked:
        way.codec.decode(blobs[t], out[t])
    decoded = time.process_time()
    if cost is not None:
        for t, blob in enumerate(blobs):
            way.codec.decode(blob, out[t])
        cost.psnr_db.append(psnr_db(smaller, out))
        cost.mb.append(len(pack_frames(way.codec.name, smaller.shape, blobs)[0]) / 1e6)
        cost.npz_share.append(100 * cost.mb[-1] * 1e6 / npz_bytes)
    return 1000 * (encoded - begun), 1000 * (decoded - before)


def _results(way: Way, cost: Cost, setting: dict[str, object]) -> Iterator[Result]:
    name, setting = f"storage/{way.name.replace(',', '').replace(' ', '_')}", {**setting, "lossless": way.codec.lossless}
    if finite := [value for value in cost.psnr_db if math.isfinite(value)]:
        yield result(f"{name}/psnr_mean", "dB", finite, setting)
    yield result(f"{name}/size_mean", "MB/clip", cost.mb, setting)
    yield result(f"{name}/share_of_npz_mean", "%", cost.npz_share, setting)
    yield result(f"{name}/decode", "CPU ms/clip", cost.decode_ms, setting)
    yield result(f"{name}/encode", "CPU ms/clip", cost.encode_ms, setting)


def _table(costs: dict[Way, Cost], spec: ClipSpec) -> str:
    decoded = f"decode {min(FRAMES, spec.frames)} of {spec.frames}, CPU ms"
    header = ["frames stored as", "PSNR mean, dB", "min", "MB a clip", "of the npz", decoded, "encode, CPU ms"]
    rows = []
    for way, cost in costs.items():
        psnr = ["exact", "exact"] if way.codec.lossless else [f"{statistics.fmean(cost.psnr_db):.1f}", f"{min(cost.psnr_db):.1f}"]
        size = [f"{statistics.fmean(cost.mb):.2f}", f"{statistics.fmean(cost.npz_share):.0f} %"]
        rows.append([f"{way.name}{' ¹' if way.store_size else ''}", *psnr, *size, cell(cost.decode_ms, 1), cell(cost.encode_ms, 0)])
    return markdown(header, rows)


def _draw(path: Path, costs: dict[Way, Cost]) -> None:
    from .plots import Panel, Point, draw  # matplotlib comes with the extra `train` alone

    def point(way: Way, cost: Cost, height: float, sides: Sides) -> Point:
        side = sides.get(way.name) or sides.get(way.family, (-1, 1))
        return Point(statistics.fmean(cost.mb), height, way.name.removeprefix("jpeg "), way.family, side)

    kept = [point(way, cost, statistics.fmean(cost.psnr_db), KEPT_SIDES) for way, cost in costs.items() if math.isfinite(sum(cost.psnr_db))]
    decode = [point(way, cost, statistics.median(cost.decode_ms), DECODE_SIDES) for way, cost in costs.items()]
    title = f"What {FRAMES} frames cost to decode"
    draw(path, [Panel("What the frames keep (zstd: everything)", "MB a clip", "mean PSNR, dB", kept), Panel(title, "MB a clip", "CPU ms a clip", decode, True)])
