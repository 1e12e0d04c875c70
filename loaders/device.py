"""From decoded frames to finished clips: crop -> resize -> flip -> colour -> erase, in uint8 throughout.

On a CPU the decoding thread finishes its clip; to a GPU go the stored frames, finished there a batch at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from clips.clip import ClipSpec

from .colour import matrices
from .sample import View

FRAMES_AT_ONCE = 4  # that a decoding thread finishes together: 1.2 MB stay in its cache. Whole clips of 16 cost 1.08 times as much, single frames 1.09
CHUNK_BYTES = 1 << 28  # of the float frames that a GPU holds at once while it resizes


class FinishingFrames:
    """Finishes each clip in the thread that decoded it, from frames and by way of rows that the thread keeps for the next clip."""

    def __init__(self, stored: ClipSpec, size: tuple[int, int]) -> None:
        self._shape, self._size = (stored.height, stored.width, 3), size
        self._own = threading.local()
        torch.get_num_threads()  # settles it for this thread: one that has not asked yet would take over what `one_thread` sets

    def __call__(self, out: np.ndarray, view: View) -> FinishingClip:
        """The frames of one clip, to be finished into `out` uint8 (T, h, w, 3)."""
        if not hasattr(self._own, "frames"):
            self._own.frames = np.empty((FRAMES_AT_ONCE, *self._shape), np.uint8)
            self._own.rows = torch.empty(FRAMES_AT_ONCE * self._size[0] * self._shape[1] * 3, dtype=torch.uint8)
        return FinishingClip(self._own.frames, self._own.rows, out, view)


class FinishingClip:
    """One clip of FinishingFrames."""

    def __init__(self, frames: np.ndarray, rows: torch.Tensor, out: np.ndarray, view: View) -> None:
        self._place, self._frames = frames, torch.from_numpy(frames)
        self._rows, self._out, self._view = rows, torch.from_numpy(out), view

    def place(self, number: int) -> np.ndarray:
        frame: np.ndarray = self._place[number % FRAMES_AT_ONCE]
        return frame

    def done(self, number: int) -> None:
        ready = number % FRAMES_AT_ONCE + 1
        if ready == FRAMES_AT_ONCE or number == len(self._out) - 1:
            finish(self._frames[:ready], self._view, self._out[number + 1 - ready : number + 1], self._rows)


def one_thread() -> None:
    """A decoding thread's torch works alone: by default each would start as many helpers as there are cores."""
    torch.set_num_threads(1)


def finish(clip: torch.Tensor, view: View, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """On a CPU: the view's box of uint8 (T, H, W, 3) resized bilinearly (half-pixel centres, no antialiasing), flipped, painted, into uint8 (T, h, w, 3).

    Rows first, then columns, in two calls of torch's uint8 kernel, which takes the columns of all rows first: .3 of 2.5 ms a clip saved.
    At most 1 of 255 from the exact value. `rows` is memory for what lies between.
    """
    box, (num_frames, height) = view.box, out.shape[:2]
    region = clip[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if region.shape == out.shape:
        out.copy_(region)
    else:
        size = num_frames * height * box.width * 3
        between = (torch.empty(size, dtype=torch.uint8) if rows is None else rows[:size]).view(num_frames, height, box.width, 3)
        _resize(region, between)
        _resize(between, out)
    if view.flip:
        out.copy_(out.flip(2))
    paint(out[None], [view])


def _resize(frames: torch.Tensor, out: torch.Tensor) -> None:
    """Both go in as views (T, 3, H, W) whose memory stays (T, H, W, 3)."""
    torch.ops.aten.upsample_bilinear2d.out(frames.permute(0, 3, 1, 2), list(out.shape[1:3]), False, out=out.permute(0, 3, 1, 2))


def crop_resize_flip(video: torch.Tensor, views: Sequence[View], size: tuple[int, int]) -> torch.Tensor:
    """uint8 (B, T, h, w, 3) contiguous, a new tensor, from uint8 (B, T, H, W, 3): each clip's box resized, flipped and painted as `finish` does."""
    if video.is_cuda:
        clips = max(1, CHUNK_BYTES // (4 * video.shape[1] * size[0] * size[1] * 3))
        parts = [lerp(video[start : start + clips], views[start : start + clips], size) for start in range(0, len(views), clips)]
        for number, part in enumerate(parts):
            paint(part, views[number * clips : (number + 1) * clips])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    out = torch.empty((len(views), video.shape[1], *size, 3), dtype=torch.uint8)
    for clip, view, target in zip(video, views, out, strict=True):
        finish(clip, view, target)
    return out


def lerp(video: torch.Tensor, views: Sequence[View], size: tuple[int, int]) -> torch.Tensor:
    """The same without the paint on any device in a few operations for all clips: four neighbours of each pixel gathered and blended in fp32, then rounded.

    A flip only reads the columns the other way round.
    """
    rows = _neighbours([view.box.top for view in views], [view.box.height for view in views], size[0])
    columns = _neighbours([view.box.left for view in views], [view.box.width for view in views], size[1])
    flips = torch.tensor([view.flip for view in views])[:, None]
    columns = [torch.where(flips, part.flip(1), part) for part in columns]
    upper, lower, down = (part.to(video.device, non_blocking=True)[:, :, None] for part in rows)  # (B, h, 1)
    left, right, across = (part.to(video.device, non_blocking=True)[:, None, :] for part in columns)  # (B, 1, w)
    clip = torch.arange(len(views), device=video.device)[:, None, None]
    frames = video.transpose(0, 1)  # (T, B, H, W, 3): the three gathered axes then stand side by side
    down, across = down[..., None], across[..., None]
    above = torch.lerp(frames[:, clip, upper, left].float(), frames[:, clip, upper, right].float(), across)
    below = torch.lerp(frames[:, clip, lower, left].float(), frames[:, clip, lower, right].float(), across)
    return torch.lerp(above, below, down).round_().to(torch.uint8).transpose(0, 1).contiguous()


def _neighbours(begin: Sequence[int], length: Sequence[int], size: int) -> list[torch.Tensor]:
    """int64, int64, fp32 (B, size): the pixels on either side of each output pixel's centre, and the second one's weight."""
    start, extent = torch.tensor(begin)[:, None], torch.tensor(length)[:, None]
    centre = ((torch.arange(size, dtype=torch.float64) + 0.5) * (extent.double() / size) - 0.5).clamp(min=0)
    first = centre.floor().long()
    second = torch.minimum(first + 1, extent - 1)
    return [start + first, start + second, (centre - first).float()]


def paint(video: torch.Tensor, views: Sequence[View]) -> None:
    """Changes colours of uint8 (B, T, h, w, 3) in place and erases, one code for every device and the same bytes on each."""
    if any(view.colour for view in views):
        _recolour(video, torch.from_numpy(matrices([view.colour for view in views])))
    if any(view.colour and view.colour.above < 255 for view in views):
        above = torch.tensor([view.colour.above if view.colour else 255 for view in views], dtype=torch.uint8).to(video.device, non_blocking=True)
        video ^= (video > above.view(-1, 1, 1, 1, 1)).view(torch.uint8).neg_()  # 255 - v is v ^ 255, which is v ^ -1
    if any(view.colour and view.colour.bits < 0xFF for view in views):
        bits = torch.tensor([view.colour.bits if view.colour else 0xFF for view in views], dtype=torch.uint8).to(video.device, non_blocking=True)
        video &= bits.view(-1, 1, 1, 1, 1)
    for clip, view in zip(video, views, strict=True):
        if view.erasure:
            down, across = view.erasure.of(*video.shape[2:4])
            for channel, value in enumerate(view.erasure.fill):
                clip[:, down, across, channel] = value


def _recolour(video: torch.Tensor, matrix: torch.Tensor) -> None:
    """Each pixel's RGB times `matrix` fp32 (B, 3, 4), rounded. Plane by plane: a product of matrices takes twice as long on a CPU."""
    matrix = matrix.to(video.device, non_blocking=True)[..., None, None, None]
    red, green, blue = video.float().unbind(-1)
    for channel in range(3):
        row = matrix[:, channel]
        plane = (red * row[:, 0]).addcmul_(green, row[:, 1]).addcmul_(blue, row[:, 2]).add_(row[:, 3])
        video[..., channel] = plane.round_().clamp_(0, 255)


def to_device(video: torch.Tensor, device: torch.device, stream: torch.cuda.Stream) -> torch.Tensor:
    """A copy on the GPU, uploaded on a stream of its own; the current stream waits for it, the host does not."""
    with torch.cuda.stream(stream):
        uploaded = video.to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    uploaded.record_stream(current)
    return uploaded
