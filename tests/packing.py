"""What tests of packing and verifying share: threads for worker processes, shards read without our own readers, refusals."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard

from clips.errors import InputError
from clips.manifest import Manifest
from convert.pack import PackConfig, pack

COUNTS = {"train": {"nongesture": 5, "gesture": 3}, "val": {"nongesture": 1, "gesture": 1}}
SMALL = 0.06  # MiB: a shard of 8x32x32 holds two clips as zstd and four as jpeg


class InThreads(ThreadPoolExecutor):
    """Stands in for ProcessPoolExecutor: a worker process takes half a second to start."""

    def __init__(self, workers: int, mp_context: object, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()) -> None:
        super().__init__(workers, initializer=initializer, initargs=initargs)


def use_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.pool.ProcessPoolExecutor", InThreads)


def pack_all(config: PackConfig) -> Manifest:
    """What pack gives for all shares together."""
    manifest = pack(config)
    assert manifest is not None
    return manifest


def members_of(output: Path) -> dict[str, bytes]:
    """Member name to bytes over all shards, in their order, as Python's tarfile reads them."""
    found: dict[str, bytes] = {}
    for path in sorted(output.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                assert info.name not in found
                found[info.name] = tar.extractfile(info).read()  # type: ignore[union-attr]  # all are files
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def snippets_of(home: Path) -> list[Path]:
    return sorted(home.rglob("*.npz"))


def source_of(home: Path, key: str) -> dict[str, np.ndarray]:
    with np.load(home / f"{key}.npz") as arrays:
        return dict(arrays)


def rewrite(path: Path, **arrays: Any) -> None:  # Any: arrays of every kind; None takes one away
    """The snippet with some of its arrays replaced."""
    with np.load(path) as old:
        both = dict(old) | arrays
    np.savez_compressed(path, **{name: array for name, array in both.items() if array is not None})


def zstd_video(blob: bytes) -> np.ndarray:
    """uint8 (T, H, W, 3) from a frames.mp of zstd, by msgpack and zstandard alone."""
    packed = msgpack.unpackb(blob)
    frames = b"".join(zstandard.ZstdDecompressor().decompress(frame) for frame in packed["frames"])
    return np.frombuffer(frames, np.uint8).reshape(packed["shape"])


def mask_by_hand(blob: bytes) -> np.ndarray:
    """uint8 0/1 (T, H, W) from a keypoints.mp, point by point."""
    packed = msgpack.unpackb(blob)
    mask = np.zeros(packed["shape"], np.uint8)
    for t, y, x in np.frombuffer(packed["points"], "<u2").reshape(-1, 3):
        mask[t, y, x] = 1
    return mask


def refused(config: PackConfig) -> str:
    """The one line that a user sees; nothing is left behind that looks like an end."""
    with pytest.raises(InputError) as error:
        pack(config)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    assert not_half_written(config.output)
    return text


def not_half_written(output: Path) -> bool:
    """Neither a manifest nor a temporary file nor a claim."""
    return not output.is_dir() or (not (output / "manifest.json").exists() and not list(output.rglob(".*")))


def spoil(path: Path) -> None:
    """A snippet whose headers are fine and whose mask holds twos; its size is another one."""
    with np.load(path) as arrays:
        rewrite(path, keypoints=arrays["keypoints"] * np.uint8(2))


def spoil_pixels(path: Path) -> None:
    """A snippet of the same size with a wrong byte among its values: only the checksum tells."""
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 0xFF
    path.write_bytes(blob)


def stamps(folder: Path, pattern: str = "*") -> dict[str, tuple[int, int]]:
    """Name to inode and time of every file below: a file that was written anew has others."""
    return {path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.rglob(pattern)) if path.is_file()}


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What `python -m convert ARGUMENTS` gives."""
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-m", "convert", *map(str, arguments)], capture_output=True, text=True, cwd=root, check=False)
