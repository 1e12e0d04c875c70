"""Shards back to npz, in the layout that they came from; bit-exact where the codec is."""

from __future__ import annotations

import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tyro

from clips.codecs import make_codec
from clips.environment import allocated_cpus
from clips.errors import ClipError, InputError
from clips.files import whole_file
from clips.format import IndexEntry, unpack_array, unpack_map, unpack_points
from clips.glimpse import expect_shards
from clips.keypoints import mask_of
from clips.manifest import Manifest, ShardEntry, read_index, read_manifest, tar_path
from clips.snippets import key_of

from .encode import sha256_of_array
from .pool import count, in_processes
from .verified import not_packed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnpackConfig:
    """Gives npz snippets back from shards: bit-exact from zstd, decoded frames from jpeg."""

    shards: tyro.conf.Positional[Path]
    """The folder that pack wrote."""
    output: tyro.conf.Positional[Path]
    """The folder to write SPLIT/CLASS/*.npz into; npz that are there stay as they are."""
    splits: tuple[str, ...] = ()
    """Which splits; default: all."""
    workers: int | None = None
    """Processes; default: the allocated CPUs, at most 8 outside a SLURM job."""


def unpack(config: UnpackConfig) -> int:
    """Writes every clip's npz whose file is missing; 0. Raises InputError for shards that are not whole."""
    expect_shards(config.shards)
    manifest = read_manifest(config.shards)
    if config.output.resolve() == config.shards.resolve():
        raise InputError(f"{config.output}: is the folder of the shards. Name another folder for the npz.")
    if unknown := sorted(set(config.splits) - set(manifest.splits)):
        raise InputError(f"--splits {' '.join(unknown)}: the shards hold {', '.join(manifest.splits)}.")
    wanted = {split: entry for split, entry in manifest.splits.items() if not config.splits or split in config.splits}
    jobs = [(config.shards, config.output, manifest, split, shard) for split, entry in wanted.items() for shard in entry.shards]
    total = sum(entry.num_clips for entry in wanted.values())
    written = sum(in_processes(_unpack_shard, jobs, config.workers or allocated_cpus(), total, "unpack"))
    lossless = make_codec(manifest.codec, manifest.codec_settings).lossless
    lossy = "frames are as decoded from JPEG, not as they were; other packed arrays are exact"
    exact = "every packed array has the sha256 that it had before" if lossless else lossy
    print(f"{written} npz written: {exact}{not_packed(manifest)}")
    if written < total:
        print(f"{total - written} were there and were not looked at; python -m convert verify {config.shards} --dataset-home {config.output} compares them")
    return 0


def _unpack_shard(shards: Path, output: Path, manifest: Manifest, split: str, shard: ShardEntry) -> int:
    written = 0
    path = tar_path(shards, split, shard.name)
    try:
        with path.open("rb") as file:
            for entry in read_index(shards, split, shard).clips:
                blobs = {}
                for suffix, (offset, size) in entry.members.items():
                    file.seek(offset)
                    blobs[suffix] = file.read(size)
                    if zlib.crc32(blobs[suffix]) != entry.crc32[suffix]:
                        raise ClipError(f"{path}: clip '{entry.facts.key}', member {suffix} at offset {offset}: damaged. Run python -m convert verify.")
                written += _write_npz(path, output, manifest, entry, blobs)
                count()
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}. Make space or restore the file, then run the same command.") from error
    return written


def _write_npz(path: Path, output: Path, manifest: Manifest, entry: IndexEntry, blobs: dict[str, bytes]) -> bool:
    """Whether the npz was missing, and is there now."""
    try:
        provenance = json.loads(blobs["json"])
        target = output / _inside(provenance["path"], entry)
        if target.exists():
            return False
        arrays = _arrays(manifest, blobs, provenance["arrays"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ClipError(f"{path}: clip '{entry.facts.key}': {error}. Run python -m convert verify on its folder.") from error
    with whole_file(target) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # an array may not be named allow_pickle
    return True


def _inside(path: str, entry: IndexEntry) -> str:
    """The npz's path, which must be the clip's and lead nowhere else; ValueError otherwise."""
    if key_of(path) != entry.facts.key or PurePosixPath(path).is_absolute() or ".." in path.split("/"):
        raise ValueError(f"its json tells of the npz {path!r}")
    return path


def _arrays(manifest: Manifest, blobs: dict[str, bytes], known: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:  # Any: of JSON
    """What the npz held, with its dtypes; each that can be exact has the sha256 that it had, or it is a ValueError."""
    codec = make_codec(manifest.codec, manifest.codec_settings)
    video = np.empty(manifest.stored.video_shape, np.uint8)
    for place, blob in enumerate(unpack_map(blobs["frames.mp"])["frames"]):
        codec.decode(blob, video[place])
    arrays = {str(manifest.arrays["video"]): video}
    if "keypoints.mp" in blobs:
        arrays[str(manifest.arrays["keypoints"])] = mask_of(*unpack_points(blobs["keypoints.mp"]))
    arrays |= {name: unpack_array(blobs[f"{name}.mp"]) for name in manifest.arrays["kept"] if f"{name}.mp" in blobs}
    if known.keys() != arrays.keys():
        raise ValueError(f"its json tells of the arrays {', '.join(known)}, its members are {', '.join(arrays)}")
    for name, told in known.items():
        arrays[name] = arrays[name].astype(told["dtype"], copy=False)
        exact = codec.lossless or name != manifest.arrays["video"]
        if exact and sha256_of_array(arrays[name]) != told["sha256"]:
            raise ValueError(f"array '{name}' has another sha256 than before packing")
    return arrays
