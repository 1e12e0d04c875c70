"""JPEG by libjpeg-turbo: baseline, 4:2:0. On real clips at quality 90 about 42 dB and an eighth of the npz."""

from __future__ import annotations

import math

import numpy as np
import simplejpeg

from ..clip import ClipSpec
from ..errors import InputError

# Bytes a pixel of 320x320 frames of real clips, measured; between two qualities the estimate is linear.
BYTES_PER_PIXEL = {1: 0.025, 25: 0.059, 50: 0.083, 75: 0.116, 85: 0.151, 90: 0.187, 95: 0.268, 98: 0.369, 100: 0.549}


class JpegCodec:
    """Lossy. Never progressive (2.6 times the decode time), never 4:4:4 (1.4 times): docs/format.md has the table."""

    name = "jpeg"
    lossless = False

    def __init__(self, quality: int = 90) -> None:
        if not 1 <= quality <= 100:
            raise InputError(f"--quality {quality}: expected 1 … 100. Take 90 unless you measured another.")
        self.quality = quality

    def settings(self) -> dict[str, int | str]:
        return {"quality": self.quality}

    def estimated_bytes(self, spec: ClipSpec) -> int:
        bytes_per_pixel = float(np.interp(self.quality, list(BYTES_PER_PIXEL), list(BYTES_PER_PIXEL.values())))
        return math.ceil(spec.frames * spec.height * spec.width * bytes_per_pixel)

    def encode(self, frame: np.ndarray) -> bytes:
        blob: bytes = simplejpeg.encode_jpeg(frame, quality=self.quality, colorspace="RGB", colorsubsampling="420", fastdct=False)
        return blob

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        # Accurate DCT and fancy upsampling: the pixels of PIL and of DALI's CPU decoder. Fast flags save about a tenth of the time.
        height, width = simplejpeg.decode_jpeg_header(blob)[:2]
        if (height, width) != out.shape[:2]:  # a larger picture would be written beyond `out`
            raise ValueError(f"a JPEG of {height}x{width} pixels where {out.shape[0]}x{out.shape[1]} were promised")
        simplejpeg.decode_jpeg(blob, colorspace="RGB", buffer=out, strict=True)
