"""What libjpeg-turbo can do and simplejpeg does not show: cropped decoding, and planes without conversion to RGB. By ctypes, for measurements alone.

Needs TurboJPEG's API 3 (libjpeg-turbo 3.0 or later); Debian 12 and Ubuntu 24.04 have 2.1, conda-forge has 3. The wheels of simplejpeg,
Pillow and OpenCV hold the library without these names.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

import numpy as np

from loaders.sample import Box

DECOMPRESS, RGB, MCU = 1, 0, 16  # TJINIT_DECOMPRESS, TJPF_RGB, and the pixels of a block of 4:2:0
MARGIN = 2  # pixels around a crop, so that upsampled colour at its edge has its neighbours


class Region(ctypes.Structure):
    """tjregion."""

    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


def find_library(path: Path | None) -> ctypes.CDLL | None:
    """The library at `path` or where the system looks; None where there is none, or an older one."""
    name = str(path) if path else ctypes.util.find_library("turbojpeg")
    try:
        library = ctypes.CDLL(name) if name else None
    except OSError:
        return None
    if library is None or not hasattr(library, "tj3SetCroppingRegion"):
        return None
    library.tj3Init.restype = library.tj3GetErrorStr.restype = ctypes.c_void_p
    return library


class Decoder:
    """One handle: for one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self._handle = library, ctypes.c_void_p(library.tj3Init(DECOMPRESS))

    def decode_box(self, blob: bytes, out: np.ndarray, box: Box) -> None:
        """Writes the box's pixels, and a few around them, to their places in `out` uint8 (H, W, 3); all others stay."""
        height, width = out.shape[:2]
        left, top = max(0, box.left - MARGIN) // MCU * MCU, max(0, box.top - MARGIN)
        right, bottom = min(width, box.left + box.width + MARGIN), min(height, box.top + box.height + MARGIN)
        self._decode(blob, Region(left, top, right - left, bottom - top), out[top:bottom, left:right])

    def decode_planes(self, blob: bytes, luma: np.ndarray, blue: np.ndarray, red: np.ndarray) -> None:
        """Y uint8 (H, W), Cb and Cr uint8 (H / 2, W / 2), as they stand in a 4:2:0 JPEG."""
        planes = (ctypes.c_void_p * 3)(luma.ctypes.data, blue.ctypes.data, red.ctypes.data)
        self._check(self._library.tj3DecompressToYUVPlanes8(self._handle, blob, ctypes.c_size_t(len(blob)), planes, None))

    def _decode(self, blob: bytes, region: Region, out: np.ndarray) -> None:
        size = ctypes.c_size_t(len(blob))
        self._check(self._library.tj3DecompressHeader(self._handle, blob, size))
        self._check(self._library.tj3SetCroppingRegion(self._handle, region))
        self._check(self._library.tj3Decompress8(self._handle, blob, size, ctypes.c_void_p(out.ctypes.data), out.strides[0], RGB))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(ctypes.string_at(self._library.tj3GetErrorStr(self._handle)).decode())

    def close(self) -> None:
        self._library.tj3Destroy(self._handle)
