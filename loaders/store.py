"""One copy of each shard on a disk, for all processes of a user there: named by its content, complete or absent.

FOLDER/gesture-clips-UID/by-sha256/SHA256.tar        the copy, with a modification time of whole seconds: the seal
                                  /.SHA256.claim     who makes it now (clips.claim)

A program that writes to a copy later breaks the seal without knowing (its time has a fraction), so a look at the time and the
size tells what a shard's sha256 would, without reading it. File systems that keep whole seconds show a change of size alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import BinaryIO

from clips.claim import STALE_S, age_s, claimed, is_held
from clips.errors import InputError
from clips.files import temporary_name, whole_file
from clips.manifest import ShardEntry

CHUNK_BYTES = 4 << 20
SYNC_BYTES = 64 << 20  # a steady stream to the disk: a stop in the middle waits for no more than this; no slower than one sync at the end
RESERVE_BYTES = 5 << 30  # of a disk that others use too; of a small one a twentieth
FULL = (errno.ENOSPC, errno.EDQUOT)
SECOND_NS = 10**9
TEMPORARY_COPY = re.compile(r"\.([0-9a-f]{64})\.tar\..*\.tmp")

Chunks = Generator[bytes, None, None]
Tick = Callable[[int], None]  # told the bytes just handled; what it raises ends the work


class Store:
    """The user's copies below `folder`, made when missing. Raises InputError, its text begun with `flag`, where that cannot be;

    OSError where the disk is full.
    """

    def __init__(self, folder: Path, flag: str = "") -> None:
        self.home = folder / f"gesture-clips-{os.geteuid()}"
        self.copies = self.home / "by-sha256"
        advice = "Give a folder on the node's own disk that you may write to."
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{flag}{folder}: expected a folder to stage into; found a file. {advice}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.home.mkdir(mode=0o700, exist_ok=True)
            _check_owner(self.home, flag)
            self.copies.mkdir(mode=0o700, exist_ok=True)
            probe = temporary_name(self.copies / "probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in FULL:
                raise
            raise InputError(f"{flag}{folder}: nothing can be staged there ({error.strerror}). {advice}") from error

    def path(self, shard: ShardEntry) -> Path:
        return self.copies / f"{shard.tar_sha256}.tar"

    def holds(self, shard: ShardEntry) -> bool:
        """Whether the complete copy is there and nobody wrote to it since."""
        try:
            found = self.path(shard).lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == shard.tar_bytes and found.st_mtime_ns % SECOND_NS == 0

    def is_right(self, shard: ShardEntry, tick: Tick) -> bool:
        """Whether the copy is there with the manifest's sha256; reads all of it, and seals it."""
        path = self.path(shard)
        if not path.is_file() or path.stat().st_size != shard.tar_bytes:
            return False
        digest = hashlib.sha256()
        with closing(chunks_of(str(path), lambda: path.open("rb"))) as chunks:
            for chunk in chunks:
                digest.update(chunk)
                tick(len(chunk))
        if digest.hexdigest() != shard.tar_sha256:
            return False
        if not self.holds(shard):
            _seal(path)
        return True

    def is_being_copied(self, shard: ShardEntry) -> bool:
        return is_held(self._claim(shard))

    def add(self, shard: ShardEntry, chunks: Chunks, where: str, tick: Tick) -> None:
        """Makes the copy out of `chunks`, unless it is there: read again, whatever its seal says.

        Raises HeldError while another process makes it, InputError naming `where` for other bytes than the manifest promises, OSError of this disk.
        """
        with claimed(self._claim(shard), "copies this shard"), closing(chunks):
            if self.is_right(shard, tick):
                return
            for half in self.copies.glob(f".{shard.tar_sha256}.tar.*.tmp"):
                half.unlink(missing_ok=True)  # of a process that no longer holds the claim
            with whole_file(self.path(shard)) as file:
                self._write(shard, chunks, where, file, tick)
                file.flush()
                _seal(file.fileno())

    def _write(self, shard: ShardEntry, chunks: Chunks, where: str, file: BinaryIO, tick: Tick) -> None:
        digest = hashlib.sha256()
        written = unsynced = 0
        for chunk in chunks:
            written += len(chunk)
            if written > shard.tar_bytes:
                break
            digest.update(chunk)
            file.write(chunk)
            unsynced += len(chunk)
            if unsynced >= SYNC_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                unsynced = 0
            tick(len(chunk))
        if written != shard.tar_bytes:
            found = f"more than {shard.tar_bytes}" if written > shard.tar_bytes else str(written)
            raise InputError(f"{where}: {found} bytes; the manifest promises {shard.tar_bytes}. Run python -m convert verify on its folder.")
        if digest.hexdigest() != shard.tar_sha256:
            raise InputError(f"{where}: its sha256 is not the manifest's. Run python -m convert verify on its folder.")

    def sweep(self) -> None:
        """Removes the halves that nobody works on any more; claims of the dead are taken over one by one."""
        for path in self.copies.glob(".*.tmp"):
            half = TEMPORARY_COPY.fullmatch(path.name)
            try:
                if not is_held(self.copies / f".{half[1]}.claim") if half else age_s(path) > STALE_S:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # its process ended it meanwhile

    def room_bytes(self, reserve: bool = True) -> int:
        """What may still be written here, less a reserve for others on this disk."""
        disk = shutil.disk_usage(self.copies)
        return disk.free - (min(RESERVE_BYTES, disk.total // 20) if reserve else 0)

    def _claim(self, shard: ShardEntry) -> Path:
        return self.copies / f".{shard.tar_sha256}.claim"


def _check_owner(folder: Path, flag: str) -> None:
    """A folder of that name in a shared /tmp may be anybody's: only one's own is used, and no link."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no folder"
        raise InputError(f"{flag}{folder}: expected your own folder; found {kind} of user {found.st_uid}. Give another place to stage into.")


def _seal(file: Path | int) -> None:
    os.utime(file, ns=(int(time.time()) * SECOND_NS,) * 2)


def chunks_of(where: str, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> Chunks:
    """The stream's bytes, 4 MiB at a time; what goes wrong on its side, and not where the bytes go, is an InputError that names it."""
    try:
        with opened() as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{where}: cannot be read ({reason}). Look whether it is there and may be read.") from error
