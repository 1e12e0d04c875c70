"""Clips whose bytes lie in memory, and every decoder as a way through batches of them, made of the very parts that the loader is made of.

simplejpeg, zstd       crc32 -> stored frames in the host's memory, from where a GPU would fetch them
    …-resized          the same, cropped, resized and flipped by the thread that decoded: what a training on a CPU gets
    …-gpu              stored frames uploaded, then cropped, resized and flipped by torch: what a training on a GPU gets
dali-cpu, dali-mixed   crc32 -> a look at each JPEG -> DALI decodes, crops, resizes and flips, on the CPU or on the GPU
nvimgcodec             frames in the GPU's memory and nothing more; …-engine by its JPEG engine alone, …-hybrid by cores of host and GPU
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch

from clips.clip import ClipSpec
from clips.codecs import Codec
from clips.codecs.zstd import ZstdCodec
from clips.errors import ClipError, InputError
from clips.format import ClipFacts
from clips.puppets import perform
from clips.synthetic import DEFAULT_CLASSES, plan_takes
from convert.encode import stored_frames
from convert.pack import stored_spec
from loaders.dali import LENGTH_BYTES, ROW_STEP, CarriedJpeg, DaliSource
from loaders.dali_install import check_cuda, check_wheel
from loaders.decode import DecodeThreads, Effort, FreeList, RawBatch, StoredFrames
from loaders.device import FinishingFrames, crop_resize_flip, one_thread, to_device
from loaders.requests import Request
from loaders.sample import AugmentConfig, choose_frames, random_view, training_draws, whole_view
from loaders.source import ChooseFrames, Frames, Loaded, open_source

from .floor import EPOCH, SEED
from .ours import PREFETCH

Decoder = Literal[
    "simplejpeg",
    "simplejpeg-resized",
    "simplejpeg-gpu",
    "zstd",
    "zstd-resized",
    "zstd-gpu",
    "dali-cpu",
    "dali-mixed",
    "nvimgcodec",
    "nvimgcodec-engine",
    "nvimgcodec-hybrid",
]
WITH_SHARE: Decoder = "dali-mixed"
HFLIP = 0.5
Shown = Sequence[tuple[ClipFacts, np.ndarray]]  # clips as uint8 (T, H, W, 3)


def read_clips(home: Path, split: str, num_clips: int) -> Shown:
    """All frames of clips spread over a split, decoded."""
    source = open_source(home, split)
    try:
        shown = []
        for number in np.unique(np.linspace(0, len(source.facts) - 1, num_clips).astype(int)).tolist():
            video = np.empty(source.stored.video_shape, np.uint8)
            source.fetch(number, partial(_all, len(video)), False).decode(StoredFrames(video, whole_view(*video.shape[1:3])))
            shown.append((source.facts[number], video))
        return shown
    finally:
        source.close()


def _all(num_frames: int, frames_valid: int) -> np.ndarray:
    return np.arange(num_frames)


def make_up(num_clips: int, spec: ClipSpec) -> Shown:
    """Clips as `python -m convert synthesize` makes them."""
    takes = [take for _, take in plan_takes(num_clips, spec.frames, len(DEFAULT_CLASSES), 0)]
    facts = [ClipFacts(f"{take.source}/{take.window}", take.label, take.source, None, None, None, take.frames_valid) for take in takes]
    return [(fact, perform(take, len(DEFAULT_CLASSES), spec)[0]) for fact, take in zip(facts, takes, strict=True)]


class MemorySource:
    """Encoded clips in memory, in the place of a split of shards: what decoding threads and DALI's graph ask of their source."""

    is_jpeg = True  # the graph gets no others

    def __init__(self, clips: Shown, shorter: int, quality: int | None) -> None:
        whole = ClipSpec(*clips[0][1].shape[:3])
        self.stored = stored_spec(whole, shorter if shorter != min(whole.height, whole.width) else None)
        self.codec: Codec = ZstdCodec() if quality is None else CarriedJpeg(quality, self.stored)
        self.facts = [fact for fact, _ in clips]
        self.blobs = [[self.codec.encode(frame) for frame in stored_frames(video, self.stored)] for _, video in clips]
        self.crc32 = [[zlib.crc32(blob) for blob in blobs] for blobs in self.blobs]

    @property
    def row_shape(self) -> tuple[int]:
        """As DaliSource's."""
        return (-(-(LENGTH_BYTES + max(map(len, chain.from_iterable(self.blobs)))) // ROW_STEP) * ROW_STEP,)

    @property
    def frame_bytes(self) -> float:
        """Of an encoded frame, in the mean."""
        return sum(map(len, chain.from_iterable(self.blobs))) / sum(map(len, self.blobs))

    def where(self, number: int) -> tuple[str, int]:
        return "", number

    def fetch(self, number: int, choose: ChooseFrames, with_points: bool) -> MemoryClip:
        return MemoryClip(self, number, choose(self.facts[number].frames_valid))

    def refused(self, number: int, frame: int, reason: str) -> ClipError:
        return ClipError(f"clip '{self.facts[number].key}': frame {frame} does not decode ({reason})")

    def requests(self, num_frames: int) -> Iterator[Request]:
        """Again and again all clips, frames and views as in the first epoch of a training."""
        found = []
        for number, fact in enumerate(self.facts):
            frames, view = training_draws(num_frames, SEED, EPOCH, fact.key)
            crop = random_view(self.stored.height, self.stored.width, view, AugmentConfig(), HFLIP)
            found.append(Request(number, number, partial(choose_frames, "uniform", num_frames, frames), crop))
        return cycle(found)


class MemoryClip:
    """The chosen frames of a clip; checked and decoded as those of a shard."""

    def __init__(self, source: MemorySource, number: int, chosen: np.ndarray) -> None:
        self._source, self._number, self._chosen = source, number, chosen

    def decode(self, frames: Frames) -> Loaded:
        blobs, crc32 = self._source.blobs[self._number], self._source.crc32[self._number]
        for place, frame in enumerate(self._chosen.tolist()):
            if zlib.crc32(blobs[frame]) != crc32[frame]:
                raise self._source.refused(self._number, frame, "another crc32")
            self._source.codec.decode(blobs[frame], frames.place(place))
            frames.done(place)
        fact = self._source.facts[self._number]
        return Loaded(fact.key, fact.label, None)

    def release(self) -> None:
        """Nothing was read."""


class Buffers:
    """Batch buffers that all ways of a setting use one after another, pinned for a GPU."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._lists: dict[tuple[int, ...], FreeList] = {}

    def of(self, shape: tuple[int, ...]) -> FreeList:
        return self._lists.setdefault(shape, FreeList(lambda: torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned).numpy()))


class Way(Protocol):
    """One decoder, ready."""

    def run(self, num_batches: int) -> Iterator[None]:
        """Tells of each batch when it is where it belongs; after the last the device has done all."""

    def close(self) -> None:
        """Ends threads and gives memory back."""


class InThreads:
    """Decoding threads, and what makes their batches those that a training gets, if anything does."""

    def __init__(self, source: MemorySource, spec: ClipSpec, batch: int, threads: int, buffers: Buffers, end: str, share: float = 0.0) -> None:
        self._source, self._spec, self._batch = source, spec, batch
        self._device = torch.device("cuda", 0) if end in ("gpu", "mixed") else torch.device("cpu")
        self._stream = torch.cuda.Stream(self._device) if end == "gpu" else None
        self._graph = _graph(source, spec, batch, self._device, threads, share) if end in ("cpu", "mixed") else None
        frame = self._graph.row_shape if self._graph else (source.stored.height, source.stored.width, 3)
        slots = buffers.of((batch, *(spec.video_shape if end == "resized" else (spec.frames, *frame))))
        finishing = (FinishingFrames(source.stored, (spec.height, spec.width)), one_thread) if end == "resized" else ()
        self._threads = DecodeThreads(cast(Any, source), slots, Effort(threads, PREFETCH, 0), False, *finishing)  # Any: a source that does not stage

    def run(self, num_batches: int) -> Iterator[None]:
        requests = self._source.requests(self._spec.frames)
        batches = self._threads.run([list(islice(requests, self._batch)) for _ in range(num_batches)])
        if self._graph:
            for resized in self._graph.run(map(_read, batches)):
                del resized  # DALI gets its memory back
                yield
        else:
            for raw in map(_read, batches):
                self._upload(raw)
                raw.release()
                yield
        wait(self._device)

    def _upload(self, raw: RawBatch) -> None:
        """As loaders/finish.py does."""
        if self._stream:
            video = to_device(torch.from_numpy(raw.video), self._device, self._stream)
            crop_resize_flip(video, [request.view for request in raw.requests], (self._spec.height, self._spec.width))
            self._stream.synchronize()

    def close(self) -> None:
        if self._graph:
            self._graph.close()
        self._threads.close()


def _graph(source: MemorySource, spec: ClipSpec, batch: int, device: torch.device, threads: int, share: float) -> Any:  # Any: DALI comes when chosen
    from loaders.dali_graph import DaliGraph

    return DaliGraph(cast(DaliSource, source), spec, batch, device, threads, share)  # all that the graph asks of a source this one has


def _read(raw: RawBatch) -> RawBatch:
    if errors := [outcome.error for outcome in raw.outcomes if outcome.loaded is None]:
        raise RuntimeError(errors[0])
    return raw


class NvImageCodec:
    """nvImageCodec alone: a batch's JPEGs to as many frames in the GPU's memory."""

    def __init__(self, source: MemorySource, num_frames: int, batch: int, threads: int, backend: str | None) -> None:
        from nvidia import nvimgcodec

        self._source, self._num_frames, self._batch, self._library = source, num_frames, batch, nvimgcodec
        backends = [nvimgcodec.Backend(getattr(nvimgcodec, backend), load_hint=1.0)] if backend else None
        self._decoder = nvimgcodec.Decoder(device_id=0, max_num_cpu_threads=threads, backends=backends, options=":fancy_upsampling=1")

    def run(self, num_batches: int) -> Iterator[None]:
        requests, device = self._source.requests(self._num_frames), torch.device("cuda", 0)
        for _ in range(num_batches):
            blobs = [blob for request in islice(requests, self._batch) for blob in self._chosen(request)]
            frames = self._decoder.decode([self._library.CodeStream(blob) for blob in blobs])
            wait(device)
            if refused := sum(frame is None for frame in frames):
                raise RuntimeError(f"{refused} of {len(blobs)} frames were refused")
            yield

    def _chosen(self, request: Request) -> list[bytes]:
        blobs = self._source.blobs[request.number]
        return [blobs[frame] for frame in request.choose(self._source.facts[request.number].frames_valid)]

    def close(self) -> None:
        del self._decoder


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def opener(decoder: Decoder, source: MemorySource, spec: ClipSpec, batch: int, threads: int, share: float | None, buffers: Buffers) -> Callable[[], Way]:
    """What starts a way; `spec` are finished clips."""
    if decoder.startswith("nvimgcodec"):
        backend = {"engine": "HW_GPU_ONLY", "hybrid": "HYBRID_CPU_GPU"}.get(decoder.partition("-")[2])
        return partial(NvImageCodec, source, spec.frames, batch, threads, backend)
    return partial(InThreads, source, spec, batch, threads, buffers, decoder.partition("-")[2], share or 0.0)


def why_not(decoder: Decoder) -> str | None:
    """Why a decoder is not at hand; None where it is."""
    on_gpu = decoder.endswith(("-gpu", "-mixed")) or decoder.startswith("nvimgcodec")
    if on_gpu and not torch.cuda.is_available():
        return "torch sees no GPU here"
    if decoder.startswith("nvimgcodec"):
        return None if _is_there("nvidia.nvimgcodec") else "nvidia.nvimgcodec is not installed; it comes with the extra dali"
    try:
        if decoder.startswith("dali"):
            check_wheel()
        if decoder == "dali-mixed":
            check_cuda()
    except InputError as error:
        return str(error).removeprefix("--loader dali: ")
    return None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nothing of nvidia's at all
        return False
