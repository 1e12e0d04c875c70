"""Shards made local ahead of training: a folder, or an address that webdataset reads, to a home on this disk.

manifest (checked: names in it become paths) -> indexes -> shards, once each, into the store -> links to them -> manifest, last
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from tqdm import tqdm

from clips.claim import HeldError
from clips.errors import InputError
from clips.files import sha256_of, sync_folder, temporary_name, write_whole
from clips.glimpse import expect_shards
from clips.manifest import MANIFEST, Manifest, ShardEntry, index_path, tar_path, write_manifest
from clips.registry import check_name
from clips.snippets import SPLITS

from .origin import Origin, fetch_manifest, find_origin
from .staging import POLL_S, in_words, total_bytes
from .store import FULL, Store, Tick

logger = logging.getLogger(__name__)

Places = Sequence[tuple[str, ShardEntry]]  # each shard with its split


@dataclass(frozen=True)
class StageConfig:
    """Copies shards to a local disk, once for all of your jobs there, and prints the folder to give as --dataset-home."""

    shards: tyro.conf.Positional[str]
    """The folder that pack wrote, or its address as webdataset reads it, http(s)://… and others; a file's path comes at its end, or where it says {path}."""
    folder: tyro.conf.Positional[Path]
    """The folder to stage into; all goes below it into a folder of your own, which --stage-dir finds again."""
    splits: tuple[str, ...] = ()
    """The splits to stage; default: all that there are."""
    allow_pipe: bool = False
    """Allows an address pipe:COMMAND, which runs a shell command for each file."""


def stage(config: StageConfig) -> Path:
    """The staged home, printed too; raises InputError for what is missing, wrong or too large. A home with a manifest is complete."""
    origin = find_origin(config.shards, config.allow_pipe)
    if not origin.is_remote:
        expect_shards(Path(origin.base))
    manifest, blob = fetch_manifest(origin)
    for split in config.splits:
        check_name(manifest.splits, split, "--splits")
    store = Store(config.folder.absolute())
    store.sweep()
    home = store.home / _name(manifest, blob, config.splits)
    kept = [split for split in manifest.splits if not config.splits or split in config.splits]
    places = [(split, shard) for split in kept for shard in manifest.splits[split].shards]
    try:
        _add_indexes(origin, home, places)
        missing = _missing(store, places)
        _check_room(store, missing)
        _copy(origin, store, missing)
        for split, shard in places:
            _link(store.path(shard), tar_path(home, split, shard.name))
        for split in kept:
            _add_plan(origin, home, split)
        _end(home, manifest, blob, kept)
    except OSError as error:
        if error.errno not in FULL:
            raise
        advice = "Free some space and run the same command: what is staged stays."
        raise InputError(f"{config.folder}: the disk became full ({error.strerror}); {in_words(store.room_bytes(False))} are free. {advice}") from error
    local = len(places) - len(missing)
    logger.info(f"{local} of {len(places)} shards were here already, {len(missing)} ({in_words(_bytes(missing))}) were copied; their sha256 are right")
    print(home)
    return home


def _name(manifest: Manifest, blob: bytes, splits: Sequence[str]) -> str:
    """Tells manifests apart, and parts of one: ellen_show_…-3f2a90b17c55, or …-3f2a90b17c55-train-val."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "_", str(manifest.home.get("folder", ""))).lstrip(".")[:100] or "shards"
    return "-".join([base, hashlib.sha256(blob).hexdigest()[:12], *(split for split in SPLITS if split in splits)])


def _add_indexes(origin: Origin, home: Path, places: Places) -> None:
    """First, and small: what is wrong with the address shows before hours of copying."""
    for split, shard in tqdm(places, desc="indexes", unit="shard"):
        path = index_path(home, split, shard.name)
        if path.is_file() and sha256_of(path) == shard.index_sha256:
            continue
        relative = path.relative_to(home).as_posix()
        blob = origin.read(relative)
        if hashlib.sha256(blob).hexdigest() != shard.index_sha256:
            raise InputError(f"{origin.where(relative)}: its sha256 is not the manifest's. Run python -m convert verify on its folder.")
        write_whole(path, blob)


def _missing(store: Store, places: Places) -> list[tuple[str, ShardEntry]]:
    """The shards without a copy of the right sha256; reads all copies that there are."""
    found = [(split, shard) for split, shard in places if store.path(shard).exists()]
    right = set()
    with _progress("check", _bytes(found)) as tick:
        for split, shard in found:
            if store.is_right(shard, tick):
                right.add(shard.tar_sha256)
            else:
                logger.info(f"{store.path(shard)}: is not the bytes that were staged; {split} shard {shard.name} is copied again")
    return [(split, shard) for split, shard in places if shard.tar_sha256 not in right]


def _check_room(store: Store, missing: Places) -> None:
    needed, free = _bytes(missing), store.room_bytes(reserve=False)
    if needed > free:
        advice = "Free some space, give another folder, or take fewer --splits"
        raise InputError(f"{store.home.parent}: {len(missing)} shards need {needed} bytes ({in_words(needed)}), free are {free} ({in_words(free)}). {advice}.")


def _copy(origin: Origin, store: Store, missing: Places) -> None:
    """Copies what others do not copy meanwhile, and waits for what they do."""
    waiting, told = list(missing), False
    with _progress("stage", _bytes(missing)) as tick:
        while waiting:
            held: list[tuple[str, ShardEntry]] = []
            for split, shard in waiting:
                path = tar_path(Path(), split, shard.name).as_posix()
                try:
                    store.add(shard, origin.chunks(path), origin.where(path), tick)
                except HeldError as error:
                    held.append((split, shard))
                    reason = str(error)
            waiting = held
            if waiting:
                if not told:
                    logger.info(reason)
                told = True
                time.sleep(POLL_S)


def _link(copy: Path, path: Path) -> None:
    """Makes `path` the copy's second name, or a link to it where a file has but one."""
    if path.exists() and path.samefile(copy):
        return
    temporary = temporary_name(path)
    try:
        os.link(copy, temporary)
    except OSError as error:
        if error.errno in FULL:
            raise
        temporary.symlink_to(os.path.relpath(copy, path.parent))
    temporary.replace(path)


def _add_plan(origin: Origin, home: Path, split: str) -> None:
    """plan.json, which verify wants and training does not."""
    path = home / split / "plan.json"
    if path.is_file():
        return
    try:
        write_whole(path, origin.read(f"{split}/plan.json"))
    except InputError as error:
        logger.info(f"{error} Training does without it; python -m convert verify does not.")


def _end(home: Path, manifest: Manifest, blob: bytes, splits: Sequence[str]) -> None:
    """Writes the manifest: as it came, or of the staged splits alone."""
    for split in splits:
        sync_folder(home / split)
    if (home / MANIFEST).is_file():
        return
    if len(splits) == len(manifest.splits):
        write_whole(home / MANIFEST, blob)
    else:
        write_manifest(home, replace(manifest, splits={split: manifest.splits[split] for split in splits}))


@contextmanager
def _progress(verb: str, num_bytes: int) -> Iterator[Tick]:
    with tqdm(total=num_bytes, desc=verb, unit="B", unit_scale=True, smoothing=0.05, disable=num_bytes == 0) as bar:
        yield bar.update


def _bytes(places: Places) -> int:
    return total_bytes([shard for _, shard in places])
