"""Clips out of shards whose JPEGs NVIDIA DALI decodes, on the GPU or, without one, on the CPU.

threads: read -> crc32 -> look at each JPEG -> rows of bytes | dali_graph: decode -> crop -> resize -> flip, all frames of a batch at once

No byte reaches DALI unchecked: a JPEG whose header it cannot parse ends the process. Frames stored by zstd are unpacked in the threads,
exactly as for webdataset, and DALI does the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

from clips.clip import ClipSpec
from clips.codecs.jpeg import JpegCodec
from clips.errors import ClipError, InputError
from clips.manifest import is_packed

from .dali_install import check_wheel
from .shards import ShardSource, clip_error

if TYPE_CHECKING:
    import torch

    from .dali_graph import DaliGraph

LENGTH_BYTES = 4  # at the head of a row: the number of bytes that follow, little-endian; 0 where nothing was read
ROW_STEP = 64
BEGIN, END = b"\xff\xd8", b"\xff\xd9"  # of every JPEG


class DaliSource(ShardSource):
    """A split of a folder of shards; raises InputError where DALI is not installed, and for a folder of npz."""

    def __init__(self, home: Path, split: str) -> None:
        if home.is_dir() and not is_packed(home):
            raise InputError(
                f"--loader dali: {home} holds no shards; DALI decodes what python -m convert pack wrote. "
                f"Type: python -m convert pack --dataset-home {home} --output SHARDS, or leave --loader out."
            )
        check_wheel()
        super().__init__(home, split)
        self.is_jpeg = isinstance(self.codec, JpegCodec)
        if isinstance(self.codec, JpegCodec):
            self.codec = CarriedJpeg(self.codec.quality, self.stored)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of what the threads write of each frame: a row for its bytes, or the frame where it is no JPEG."""
        if not self.is_jpeg:
            return self.stored.height, self.stored.width, 3
        longest = max(int(entry.frames["size"].max()) for entry, _ in self._entries)
        return (-(-(LENGTH_BYTES + longest) // ROW_STEP) * ROW_STEP,)

    def graph(self, spec: ClipSpec, micro_batch: int, device: torch.device, threads: int, hw_decoder_load: float) -> DaliGraph:
        from .dali_graph import DaliGraph  # imports DALI

        return DaliGraph(self, spec, micro_batch, device, threads, hw_decoder_load)

    def refused(self, number: int, frame: int, reason: str) -> ClipError:
        """That DALI does not decode a frame of the clip of that number."""
        entry, shard = self._entries[number]
        return clip_error(self.path_of(shard), entry, "frames.mp", f"frame {frame} does not decode ({reason})")


class CarriedJpeg(JpegCodec):
    """The JPEG codec, which into a row (and not into a frame) writes the bytes themselves, once they were looked at."""

    def __init__(self, quality: int, stored: ClipSpec) -> None:
        super().__init__(quality)
        self._size = stored.height, stored.width

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        if out.ndim == 3:
            super().decode(blob, out)
            return
        look_at(blob, self._size)
        carry(blob, out)


def look_at(blob: bytes | memoryview, size: tuple[int, int]) -> None:
    """Raises ValueError for bytes that begin or end otherwise than a JPEG, whose header libjpeg cannot parse, or tells another picture.

    2 us a frame. Without it about every other batch with one such frame ended the process (DALI 2.4); of 3000 damaged JPEGs that pass it none did.
    """
    if blob[:2] != BEGIN or blob[-2:] != END:
        raise ValueError("no JPEG from its first to its last byte")
    height, width, colours, _ = simplejpeg.decode_jpeg_header(blob)
    if (height, width) != size or colours != "YCbCr":
        raise ValueError(f"a JPEG of {height}x{width} pixels, {colours}, where {size[0]}x{size[1]}, YCbCr, were promised")


def carry(blob: bytes | memoryview, row: np.ndarray) -> None:
    """Writes the number of bytes and the bytes into a row, uint8 (row bytes,)."""
    row[:LENGTH_BYTES] = np.frombuffer(len(blob).to_bytes(LENGTH_BYTES, "little"), np.uint8)
    row[LENGTH_BYTES : LENGTH_BYTES + len(blob)] = np.frombuffer(blob, np.uint8)


def carried(rows: np.ndarray, blank: np.ndarray) -> list[np.ndarray]:
    """The bytes in each of uint8 (N, row bytes), without a copy; `blank` for a row in which there are none."""
    lengths = np.ascontiguousarray(rows[:, :LENGTH_BYTES]).view("<u4")[:, 0].tolist()
    return [row[LENGTH_BYTES : LENGTH_BYTES + length] if length else blank for row, length in zip(rows, lengths, strict=True)]
