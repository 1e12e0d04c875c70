"""Whole shards copied to the node's own disk while training reads the source.

each shard: local already -> told | another process copies it -> looked at again | no room -> stays | else claim, copy, check -> told

A thread of every rank and job does this over one store, and claims deal the shards among them. Nothing is ever evicted, and no
fault here ends a training: what cannot be staged is read where it is, and said.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from clips.claim import HeldError
from clips.errors import InputError
from clips.manifest import ShardEntry, tar_path

from .store import FULL, Store, chunks_of

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between looks at what others copy
CLOSE_S = 5.0  # a file server that hangs is not waited for: the next run sweeps up the half


class StoppedError(Exception):
    """The stager was closed in the middle of a shard."""


class Stager:
    """One split's shards on their way to `folder`. `ready(name, path)` is told each complete copy, from a thread of its own."""

    def __init__(self, home: Path, split: str, shards: Sequence[ShardEntry], folder: Path, ready: Callable[[str, Path], None]) -> None:
        self._home, self._split, self._shards, self._folder, self._ready = home, split, shards, folder, ready
        self._lines: list[str] = []
        self._without_room: list[ShardEntry] = []
        self._is_full = False
        self._stop = threading.Event()
        self._telling = threading.Lock()  # once `close` has begun nobody is told: the reader's descriptors end
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Tells what is local, then copies the rest in the background; raises InputError where nothing can be staged in the folder."""
        if self._folder == Path():
            raise InputError("--stage-dir: expected a folder on the node's own disk; found an empty name. Is $TMPDIR set here?")
        try:
            store = Store(self._folder, "--stage-dir ")
            store.sweep()
            missing = [shard for shard in self._shards if not self._is_local(store, shard)]
            forecast = self._forecast(store, missing)
        except OSError as error:
            if error.errno not in FULL:
                raise InputError(f"--stage-dir {self._folder}: nothing can be staged there ({error.strerror or error}). Give another folder.") from error
            self._lines.append(f"{self._split}: {self._folder} is full; no room for {named(self._shards)}: read from {self._home}")
            return
        if missing:
            self._thread = threading.Thread(target=self._copy_all, args=(store, missing, forecast), name=f"staging {self._split}", daemon=True)
            self._thread.start()

    def describe(self) -> list[str]:
        """How it was at the start: what was local and where, what is being copied, what does not fit."""
        return self._lines

    def close(self) -> None:
        """Stops, in the middle of a shard too, and leaves no half of one behind."""
        with self._telling:
            self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _is_local(self, store: Store, shard: ShardEntry) -> bool:
        """Whether there is a complete copy; then it was told."""
        if store.holds(shard):
            self._tell(store, shard)
            return True
        if store.path(shard).exists():
            logger.info(f"{store.path(shard)}: changed since it was staged; {self._split} shard {shard.name} is copied again unless its sha256 is right")
        return False

    def _tell(self, store: Store, shard: ShardEntry) -> None:
        with self._telling:
            if not self._stop.is_set():
                self._ready(shard.name, store.path(shard))

    def _forecast(self, store: Store, missing: Sequence[ShardEntry]) -> list[ShardEntry]:
        """The shards that will not fit; writes the lines for the log."""
        room_bytes = at_start = max(0, store.room_bytes())
        outside = []
        for shard in missing:
            if shard.tar_bytes > room_bytes:
                outside.append(shard)
            else:
                room_bytes -= shard.tar_bytes
        local = [shard for shard in self._shards if shard not in missing]
        coming = len(missing) - len(outside)
        copying = f"; {coming} ({in_words(total_bytes(missing) - total_bytes(outside))}) are copied there meanwhile" if coming else ""
        self._lines.append(f"{self._split}: {len(local)} of {len(self._shards)} shards ({in_words(total_bytes(local))}) are local in {store.copies}{copying}")
        if outside:
            self._lines.append(f"{self._split}: no room for {named(outside)} in the {in_words(at_start)} that may be used there: read from {self._home}")
        return outside

    def _copy_all(self, store: Store, missing: Sequence[ShardEntry], forecast: Sequence[ShardEntry]) -> None:
        """Goes round the shards until each is local or known to stay where it is."""
        begin = time.monotonic()
        try:
            waiting = self._round(store, missing)
            while waiting and not self._stop.wait(POLL_S):
                waiting = self._round(store, waiting)
        except StoppedError:
            return
        except OSError as error:
            logger.info(f"{self._split}: {error.filename or store.copies}: {error.strerror or error}; what is not staged yet is read from {self._home}")
            return
        if self._without_room and self._without_room != forecast:
            logger.info(f"{self._split}: {store.copies} is full; no room for {named(self._without_room)}: read from {self._home}")
        if all(store.holds(shard) for shard in self._shards):
            logger.info(f"{self._split}: all {len(self._shards)} shards are local, {time.monotonic() - begin:.0f} s after the start")

    def _round(self, store: Store, shards: Sequence[ShardEntry]) -> list[ShardEntry]:
        """Those of the shards that others are copying; the rest is local now or stays where it is."""
        return [shard for shard in shards if not self._visit(store, shard)]

    def _visit(self, store: Store, shard: ShardEntry) -> bool:
        """Whether nothing is left to do for the shard."""
        self._go_on(0)
        source = tar_path(self._home, self._split, shard.name)
        try:
            if not store.holds(shard):
                if store.is_being_copied(shard):
                    return False
                if self._is_full or store.room_bytes() < shard.tar_bytes:
                    self._without_room.append(shard)
                    return True
                store.add(shard, chunks_of(str(source), lambda: source.open("rb")), str(source), self._go_on)
        except HeldError:
            return False
        except InputError as error:
            logger.info(f"{error} It is not staged.")
            return True
        except OSError as error:
            if error.errno in FULL:
                self._is_full = True
                self._without_room.append(shard)
                return True
            if not store.holds(shard):
                if isinstance(error, FileNotFoundError) and store.copies.is_dir():
                    return False  # its half was taken for a dead one's, as happens to a process that was suspended
                raise
        self._tell(store, shard)
        return True

    def _go_on(self, _: int) -> None:
        if self._stop.is_set():
            raise StoppedError


def total_bytes(shards: Sequence[ShardEntry]) -> int:
    return sum(shard.tar_bytes for shard in shards)


def in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def named(shards: Sequence[ShardEntry]) -> str:
    """The shards in words: the first and the last, how many, how large."""
    names = shards[0].name if len(shards) == 1 else f"{shards[0].name} … {shards[-1].name}"
    return f"{names} ({len(shards)} {'shard' if len(shards) == 1 else 'shards'}, {in_words(total_bytes(shards))})"
