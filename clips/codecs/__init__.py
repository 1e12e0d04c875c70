"""Frames to bytes and back. Adding a codec is one file and one line in CODECS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ..clip import ClipSpec
from ..errors import InputError
from ..registry import resolve

CODECS = {
    "jpeg": "clips.codecs.jpeg:JpegCodec",
    "zstd": "clips.codecs.zstd:ZstdCodec",
}


class Codec(Protocol):
    """One frame to bytes and back; safe to call from several threads at once."""

    name: str
    lossless: bool

    def settings(self) -> dict[str, int | str]:
        """What `make_codec` needs to build it again; stands in the manifest and in the plan id."""

    def estimated_bytes(self, spec: ClipSpec) -> int:
        """The bytes of a clip's frames, by arithmetic alone: the number of clips in a shard rests on it."""

    def encode(self, frame: np.ndarray) -> bytes:
        """The bytes of one frame, uint8 (H, W, 3) RGB."""

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        """Writes the frame into `out`, contiguous uint8 (H, W, 3); raises ValueError when the bytes are not such a frame."""


def make_codec(name: str, settings: Mapping[str, int | str] | None = None, flag: str = "--codec") -> Codec:
    """The codec of that name; InputError for an unknown name or a setting out of range."""
    try:
        codec: Codec = resolve(CODECS, name, flag)(**(settings or {}))
    except TypeError as error:  # from a damaged manifest, or a newer one
        raise InputError(f"{flag} {name}: {', '.join(settings or {})} are not its settings ({error}).") from error
    return codec
