"""DALI's graph: decode -> crop -> resize -> flip, all frames of a batch at once, and what goes in and comes out of it.

rows of B clips -> B x T JPEGs (or frames), each with its clip's box and flip -> DALI -> uint8 (B, T, h, w, 3), the same memory in torch

One batch is in DALI while the training works on the one before. Chance is none of DALI's: what is drawn was drawn before. Colours and
erased boxes are painted afterwards by `device.paint`, in DALI's memory: it gives the same bytes on every device, DALI's own colour
operators round otherwise. Frames are cut before they are resized, for DALI's resize looks over the edge of a region, and ours does not.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from clips.clip import ClipSpec
from clips.codecs.jpeg import JpegCodec
from clips.errors import InputError

from .dali import DaliSource, carried
from .dali_install import OTHERWISE, check_cuda, tell_engine
from .decode import Outcome, RawBatch
from .finish import Resized
from .requests import Request
from .sample import whole_view

if TYPE_CHECKING:
    from nvidia.dali.backend import TensorListCPU, TensorListGPU
    from nvidia.dali.pipeline import Pipeline

SAMPLE = re.compile(r"sample #(\d+)")  # how DALI tells what it could not decode


class DaliGraph:
    """One split's graph on one device; raises InputError where DALI cannot start."""

    def __init__(self, source: DaliSource, spec: ClipSpec, micro_batch: int, device: torch.device, threads: int, hw_decoder_load: float) -> None:
        self._source, self._spec, self._device = source, spec, device
        self.row_shape = source.row_shape
        self.numbers: Sequence[int] | None = None
        self._num_frames, self._threads, self._hw_decoder_load = micro_batch * spec.frames, threads, hw_decoder_load
        black = np.zeros((source.stored.height, source.stored.width, 3), np.uint8)
        self._blank = np.frombuffer(JpegCodec().encode(black), np.uint8)  # for the frames of a clip that was not read
        self._under_way: RawBatch | None = None
        self._pass = 0
        self._lent: deque[tuple[torch.cuda.Event, object]] = deque()  # outputs that nobody holds any more, though the GPU may still read them
        if device.type == "cuda":
            check_cuda()
            tell_engine(device, hw_decoder_load)
        self._pipe = self._start()

    def run(self, batches: Iterator[RawBatch]) -> Iterator[Resized]:
        """The same batches in the same order, the next one in DALI while the last is used; beginning another pass ends the former."""
        self._drop()
        self._pass += 1
        number = self._pass
        try:
            self._send(next(batches, None))
            while self._under_way is not None:
                done = self._receive(self._under_way)
                self._send(next(batches, None))
                yield done
                if number != self._pass:
                    raise RuntimeError("this pass was ended by a later one of the same loader; take batches from one pass at a time")
        finally:
            if number == self._pass:
                self._drop()

    def _send(self, raw: RawBatch | None) -> None:
        """Begins to work on a batch."""
        self._under_way = raw
        if raw is not None:
            self._feed(raw, {})

    def _receive(self, raw: RawBatch) -> Resized:
        """The batch under way, done; its rows are given back."""
        refused: dict[int, str] = {}  # a clip's place in the batch, and why
        while True:
            try:
                (output,) = self._pipe.outputs()  # the host waits for it: `_feed` tells why
                break
            except RuntimeError as error:
                refused |= self._blamed(raw, refused, error)
                self._pipe = self._start()
                self._feed(raw, refused)
        outcomes = [Outcome(None, refused[place], one.read_s, one.decode_s) if place in refused else one for place, one in enumerate(raw.outcomes)]
        video = self._in_torch(output, len(outcomes))
        for place, one in enumerate(outcomes):
            if one.loaded is None:
                video[place] = 0
        self._under_way = None
        raw.release()
        return Resized(video, raw.requests, outcomes)

    def _feed(self, raw: RawBatch, refused: Mapping[int, str]) -> None:
        """Gives DALI a batch, which it reads where it lies; blanks in place of the clips refused.

        A GPU's JPEG engine may write at once, whatever is before it in its stream (known of the H100's). So the host has waited for DALI's batch before,
        and memory that the training had went back to DALI only once the GPU had read it.
        """
        while self._lent and self._lent[0][0].query():
            self._lent.popleft()
        rows = raw.video.reshape(-1, *self.row_shape)
        frames: Any = carried(rows, self._blank) if self._source.is_jpeg else rows  # Any: a list of arrays, or one array
        for place in refused:
            frames[place * self._spec.frames : (place + 1) * self._spec.frames] = [self._blank] * self._spec.frames
        for name, values in boxes_of(raw.requests, raw.outcomes, self._source.stored).items():
            self._pipe.feed_input(name, np.repeat(values, self._spec.frames, axis=0))
        self._pipe.feed_input("frames", frames)
        self._pipe.schedule_run()

    def _in_torch(self, output: TensorListCPU | TensorListGPU, num_clips: int) -> torch.Tensor:
        """uint8 (B, T, h, w, 3) in the memory that DALI wrote, which on a CPU stays until the last tensor that shares it is gone."""
        tensor = output.as_reshaped_tensor([num_clips, *self._spec.video_shape])
        video = from_dlpack(tensor)
        if video.is_cuda:
            when_gone(video, partial(self._take_back, tensor))
        return video

    def _take_back(self, tensor: object) -> None:
        """The last to hold an output let it go: DALI gets it when the GPU has done all that it was told up to now."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._lent.append((event, tensor))

    def _blamed(self, raw: RawBatch, refused: Mapping[int, str], error: RuntimeError) -> dict[int, str]:
        """The clips that DALI says it cannot decode, else those that libjpeg cannot, and why; the error itself where there are none."""
        numbers = {int(number) for number in SAMPLE.findall(str(error))} or self._strictly_bad(raw)
        found = {}
        for number in sorted(numbers, reverse=True):  # of a clip the first frame stays
            place, at = divmod(number, self._spec.frames)
            if place < len(raw.requests) and place not in refused and self._source.is_jpeg:
                request = raw.requests[place]
                clip = self._own(request.number)
                frame = int(request.choose(self._source.facts[clip].frames_valid)[at])
                found[place] = str(self._source.refused(clip, frame, "DALI refuses it"))
        if not found:
            keys = ", ".join(self._source.facts[self._own(request.number)].key for request in raw.requests)
            raise RuntimeError(f"DALI fails at the clips {keys}") from error
        return found

    def _own(self, number: int) -> int:
        """The source's number of a clip, which a part of it counts otherwise."""
        return number if self.numbers is None else self.numbers[number]

    def _strictly_bad(self, raw: RawBatch) -> set[int]:
        """The numbers of a batch's frames that libjpeg does not decode."""
        bad, frame = set(), np.empty((self._source.stored.height, self._source.stored.width, 3), np.uint8)
        for number, blob in enumerate(carried(raw.video.reshape(-1, *self.row_shape), self._blank) if self._source.is_jpeg else ()):
            try:
                self._source.codec.decode(blob.tobytes(), frame)
            except ValueError:
                bad.add(number)
        return bad

    def _drop(self) -> None:
        """Ends the work on a batch that nobody wants any more."""
        if self._under_way is not None:
            raw, self._under_way = self._under_way, None
            try:
                self._pipe.outputs()
            except (RuntimeError, StopIteration):  # the second where an error was raised for it before
                self._pipe = self._start()
            raw.release()

    def close(self) -> None:
        """Waits for the batch under way; what the training holds stays as it is."""
        self._pass += 1
        self._drop()
        if hasattr(self, "_pipe"):
            del self._pipe

    def _start(self) -> Pipeline:
        """The graph, ready: in the default executor, whose outputs are never written over while somebody holds them."""
        try:
            from nvidia.dali import fn, types
            from nvidia.dali.pipeline import Pipeline
        except (ImportError, OSError) as error:
            raise InputError(f"--loader dali: NVIDIA DALI is installed but cannot be imported ({error}). Install it anew, {OTHERWISE}") from error
        on_gpu, is_jpeg = self._device.type == "cuda", self._source.is_jpeg
        device_id = torch.cuda.current_device() if on_gpu and self._device.index is None else self._device.index if on_gpu else None
        pipe = Pipeline(self._num_frames, self._threads, device_id, prefetch_queue_depth=1)
        with pipe:
            frames = fn.external_source(name="frames", dtype=types.UINT8, ndim=1 if is_jpeg else 3, layout=None if is_jpeg else "HWC", no_copy=True)
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            if is_jpeg:
                frames = fn.decoders.image(
                    frames,
                    device="mixed" if on_gpu else "cpu",
                    output_type=types.RGB,
                    jpeg_fancy_upsampling=True,  # as libjpeg does; without it pixels differ by .4 of 255 in the mean, 36 at most
                    adjust_orientation=False,
                    hw_decoder_load=self._hw_decoder_load,
                    preallocate_height_hint=self._source.stored.height,
                    preallocate_width_hint=self._source.stored.width,
                )
            elif on_gpu:
                frames = frames.gpu()
            region = fn.slice(frames, start=corner, shape=shape, axes=[0, 1])
            resized = fn.resize(region, size=[self._spec.height, self._spec.width], interp_type=types.INTERP_LINEAR, antialias=False)
            pipe.set_outputs(fn.flip(resized, horizontal=flip, vertical=0))
        try:
            pipe.build()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"--loader dali: DALI cannot start on {self._device} ({reason}). Mend that, {OTHERWISE}") from error
        return pipe


def when_gone(video: torch.Tensor, then: Callable[[], None]) -> None:
    """Calls `then` once nothing shares the tensor's memory any more."""
    weakref.finalize(video.untyped_storage(), then).atexit = False


def boxes_of(requests: Sequence[Request], outcomes: Sequence[Outcome], stored: ClipSpec) -> dict[str, np.ndarray]:
    """Of each clip corner and shape of its box, int32 (B, 2) down and across, and its flip, int32 (B,); the whole frame where nothing was read."""
    whole = whole_view(stored.height, stored.width)
    views = [request.view if one.loaded else whole for request, one in zip(requests, outcomes, strict=True)]
    return {
        "corner": np.array([(view.box.top, view.box.left) for view in views], np.int32),
        "shape": np.array([(view.box.height, view.box.width) for view in views], np.int32),
        "flip": np.array([view.flip for view in views], np.int32),
    }
