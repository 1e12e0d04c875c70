"""What tests of staging share: shards of any bytes, a stager whose reader remembers, a gate in the middle of a copy, what lies in a store."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clips.manifest import ShardEntry, tar_path
from loaders import staging
from loaders.staging import Stager
from loaders.store import Store

SOON_S = 60.0  # a busy disk syncs slowly; a test that waits for more is red
ELSEWHERE = {"host": "another-node", "pid": 4711, "space": "another-boot", "started": "17"}


def make_shards(home: Path, count: int = 3, size: int = 5000, split: str = "train") -> list[ShardEntry]:
    """HOME/SPLIT/*.tar of seeded bytes, each somewhat larger than the one before."""
    entries = []
    for number in range(count):
        blob = random.Random(f"{split} {number}").randbytes(size + number)
        path = tar_path(home, split, f"{split}-{number:06d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
        entries.append(ShardEntry(f"{split}-{number:06d}", 1, len(blob), hashlib.sha256(blob).hexdigest(), "0" * 64, (1, 0)))
    return entries


class Reader:
    """Stands for the source of shards: remembers what it was told, and waits for it."""

    def __init__(self, home: Path, shards: list[ShardEntry], folder: Path, split: str = "train") -> None:
        self.told: dict[str, Path] = {}
        self._change = threading.Condition()
        self.stager = Stager(home, split, shards, folder, self._ready)

    def _ready(self, name: str, path: Path) -> None:
        with self._change:
            assert name not in self.told, "told twice"
            self.told[name] = path
            self._change.notify_all()

    def wait(self, *names: str) -> None:
        with self._change:
            assert self._change.wait_for(lambda: set(names) <= set(self.told), SOON_S), f"told only of {sorted(self.told)}"

    def wait_for_end(self) -> None:
        """Until the background thread is through."""
        thread = self.stager._thread
        if thread is not None:
            thread.join(SOON_S)
            assert not thread.is_alive()


class Gate:
    """Stops copies of some shards in their middle until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *closed_for: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._closed_for = closed_for
        monkeypatch.setattr(staging, "chunks_of", self._chunks)

    def _chunks(self, where: str, opened: Any) -> Iterator[bytes]:
        blob = Path(where).read_bytes()
        yield blob[:1000]
        if Path(where).stem in self._closed_for:
            self.reached.set()
            while not self.opened.is_set():
                yield b""  # each look at the stop comes with a chunk
        yield blob[1000:]

    def wait(self) -> None:
        assert self.reached.wait(SOON_S)


def staged(home: Path, shards: list[ShardEntry], folder: Path, split: str = "train") -> Reader:
    """A reader whose stager went to its end, closed."""
    reader = Reader(home, shards, folder, split)
    reader.stager.start()
    reader.wait_for_end()
    reader.stager.close()
    return reader


def names(shards: list[ShardEntry]) -> list[str]:
    return [shard.name for shard in shards]


def copies_in(folder: Path) -> dict[str, bytes]:
    """Name to bytes of all that lies in the store, hidden files too."""
    return {path.name: path.read_bytes() for path in sorted(Store(folder).copies.iterdir())}


def expected(home: Path, shards: list[ShardEntry], split: str = "train") -> dict[str, bytes]:
    """What the store should hold for these shards, and nothing besides."""
    return {f"{shard.tar_sha256}.tar": tar_path(home, split, shard.name).read_bytes() for shard in sorted(shards, key=lambda shard: shard.tar_sha256)}


def put_claim(folder: Path, shard: ShardEntry, holder: object = ELSEWHERE, silent_s: float = 0.0) -> Path:
    """Another process's claim on the shard, its last heartbeat `silent_s` ago."""
    path = Store(folder).copies / f".{shard.tar_sha256}.claim"
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - silent_s,) * 2)
    return path


def put_half(folder: Path, shard: ShardEntry, host: str = "another-node", pid: int = 4711) -> Path:
    """What a process leaves that dies in the middle of the shard."""
    path = Store(folder).copies / f".{shard.tar_sha256}.tar.{host}.{pid}.0123abcd.tmp"
    path.write_bytes(b"half")
    return path
