"""Where shards come from: a folder, or an address that webdataset's gopen reads. What it says is checked before it becomes a path."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clips.errors import InputError
from clips.manifest import MANIFEST, Manifest, ShardEntry, read_manifest
from clips.snippets import SPLITS

from .store import Chunks, chunks_of

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
ENDED = re.compile(r": exit (-?\d+) ")  # how gopen tells of a command that failed
CURL_EXITS = {6: "no such host", 7: "no connection", 22: "the server refuses it or has no such file", 28: "no answer in time", 60: "certificate not trusted"}


@dataclass(frozen=True)
class Origin:
    """A folder, or an address with {path} where a file's path goes, at its end where it has none."""

    base: str
    is_remote: bool

    def where(self, path: str) -> str:
        """The file's place, for reading and for errors."""
        return self.base.replace("{path}", path) if self.is_remote and "{path}" in self.base else f"{self.base}/{path}"

    def chunks(self, path: str) -> Chunks:
        """The file's bytes; raises InputError that names its place."""
        where = self.where(path)
        return chunks_of(where, lambda: _remote(where) if self.is_remote else open(where, "rb"))

    def read(self, path: str) -> bytes:
        return b"".join(self.chunks(path))


def find_origin(shards: str, allow_pipe: bool) -> Origin:
    """The origin as a user types it: a folder or an address, with or without manifest.json at its end."""
    base = shards.removesuffix(MANIFEST).rstrip("/") if shards.endswith(f"/{MANIFEST}") else shards.rstrip("/")
    if os.path.isdir(base or "/"):  # no error for a command of 300 letters, as Path.is_dir gives
        return Origin(base, is_remote=False)
    scheme = SCHEME.match(shards)
    if scheme is None:
        raise InputError(f"{shards}: no such folder; expected shards that python -m convert pack wrote, or their address.")
    if scheme[1].lower() == "pipe" and not allow_pipe:
        raise InputError(f"{shards}: would run a shell command for each file. Add --allow-pipe if that is meant.")
    return Origin(base, is_remote=True)


@contextmanager
def _remote(address: str) -> Iterator[BinaryIO]:
    """What webdataset's gopen opens; a command behind it ends with the block, whatever it waits for."""
    try:
        from webdataset.gopen import gopen  # here alone: it imports torch
    except ImportError as error:
        raise InputError(f"{address}: reading it needs webdataset ({error}). Type: make install") from error
    try:
        stream = gopen(address)
        try:
            yield stream
        except BaseException:
            if process := getattr(stream, "proc", None):
                process.kill()
            with suppress(OSError):
                stream.close()
            raise
        stream.close()  # raises for a command that failed
    except OSError as error:
        if ended := ENDED.search(str(error)):
            reason = CURL_EXITS.get(int(ended[1])) if address.startswith("http") else None
            raise OSError(reason or f"its command ended with exit code {ended[1]}") from error
        raise


def fetch_manifest(origin: Origin) -> tuple[Manifest, bytes]:
    """The manifest and its bytes; raises InputError for one that is none, and for names in it that must not become paths."""
    where = origin.where(MANIFEST)
    if not origin.is_remote and not Path(where).exists():
        read_manifest(Path(where).parent)  # raises, in its own words
    blob = origin.read(MANIFEST)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(blob)
        try:
            manifest = read_manifest(Path(folder))
        except InputError as error:
            raise InputError(str(error).replace(str(Path(folder) / MANIFEST), where)) from error
    for fault in _faults(manifest):
        raise InputError(f"{where}: {fault}. Give a manifest that python -m convert wrote.")
    return manifest, blob


def _faults(manifest: Manifest) -> Iterator[str]:
    """What must not become a path or an address: the manifest may be anybody's."""
    if not isinstance(manifest.home, dict):
        yield "its home is no table"
    for split, entry in manifest.splits.items():
        if split not in SPLITS:
            yield f"split {split!r}; expected {', '.join(SPLITS)}"
        names = set()
        for shard in entry.shards:
            if (fault := _fault_of_shard(shard)) or shard.name in names:
                yield f"shard {shard.name!r} of split {split} {fault or 'is named twice'}"
            names.add(shard.name)


def _fault_of_shard(shard: ShardEntry) -> str | None:
    if not isinstance(shard.name, str) or not PLAIN_NAME.fullmatch(shard.name):
        return "is no plain file name"
    if not all(isinstance(digest, str) and SHA256.fullmatch(digest) for digest in (shard.tar_sha256, shard.index_sha256)):
        return "has a sha256 that is none"
    if not isinstance(shard.tar_bytes, int) or shard.tar_bytes < 0:
        return f"has {shard.tar_bytes!r} bytes"
    return None
