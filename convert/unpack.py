"""Shards back to npz, in the layout that they came from; bit-exact where the codec is."""

from __future__ import annotations

import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from clips.codecs import make_codec
from clips.environment import allocated_cpus
from clips.errors import ClipError, InputError
from clips.files import whole_file
from clips.format import FormatError, IndexEntry, unpack_array, unpack_map, unpack_points
from clips.keypoints import mask_of
from clips.manifest import Manifest, ShardEntry, read_index, read_manifest, tar_path

from .encode import sha256_of_array
from .pool import count, in_processes

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
    manifest = read_manifest(config.shards)
    if unknown := sorted(set(config.splits) - set(manifest.splits)):
        raise InputError(f"--splits {' '.join(unknown)}: the shards hold {', '.join(manifest.splits)}.")
    wanted = {split: entry for split, entry in manifest.splits.items() if not config.splits or split in config.splits}
    jobs = [(config.shards, config.output, manifest, split, shard) for split, entry in wanted.items() for shard in entry.shards]
    total = sum(entry.num_clips for entry in wanted.values())
    written = sum(in_processes(_unpack_shard, jobs, config.workers or allocated_cpus(), total, "unpack"))
    lossless = make_codec(manifest.codec, manifest.codec_settings).lossless
    exact = "every array has the sha256 that it had before packing" if lossless else "frames are as decoded from JPEG, not as they were; keypoints are exact"
    print(f"{written} npz written, {total - written} were there: {exact}")
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
    provenance = json.loads(blobs["json"])
    target = output / provenance["path"]
    if target.exists():
        return False
    codec = make_codec(manifest.codec, manifest.codec_settings)
    try:
        arrays = _arrays(manifest, blobs)
    except (FormatError, LookupError, ValueError) as error:
        raise ClipError(f"{path}: clip '{entry.facts.key}': {error}. Run python -m convert verify on its folder.") from error
    for name, known in provenance["arrays"].items():
        arrays[name] = arrays[name].astype(known["dtype"], copy=False)
        exact = codec.lossless or name != manifest.arrays["video"]
        if exact and sha256_of_array(arrays[name]) != known["sha256"]:
            raise ClipError(f"{path}: clip '{entry.facts.key}': array '{name}' has another sha256 than before packing. Run python -m convert verify.")
    with whole_file(target) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # an array may not be named allow_pickle
    return True


def _arrays(manifest: Manifest, blobs: dict[str, bytes]) -> dict[str, np.ndarray]:
    codec = make_codec(manifest.codec, manifest.codec_settings)
    video = np.empty(manifest.stored.video_shape, np.uint8)
    for place, blob in enumerate(unpack_map(blobs["frames.mp"])["frames"]):
        codec.decode(blob, video[place])
    arrays = {str(manifest.arrays["video"]): video}
    if "keypoints.mp" in blobs:
        arrays[str(manifest.arrays["keypoints"])] = mask_of(*unpack_points(blobs["keypoints.mp"]))
    return arrays | {name: unpack_array(blobs[f"{name}.mp"]) for name in manifest.arrays["kept"] if f"{name}.mp" in blobs}
